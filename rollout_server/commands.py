"""`agentloop serve`, and the same options behind `python -m rollout_server`.

The options are generated from the fields of `ServerSettings`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from agentloop.commands.options import given, parameter, with_options
from agentloop.config.server import ServerSettings
from agentloop.runtime.event_loop import uncollected
from rollout_server.process import THREAD_VARIABLES
from rollout_server.settings import load_settings


def register(app: typer.Typer) -> None:
    """Add the server's commands to the `agentloop` program."""
    app.command("serve")(serve_command())


def serve_command(model: type[ServerSettings] = ServerSettings) -> Callable[..., None]:
    """Return the `serve` command, with one option for each field of `model`, and `--settings`."""

    def serve(context: typer.Context, settings: Path | None, **options: Any) -> None:
        """Serve a model: tokens in, tokens out, with SGLang's HTTP API.

        Try it:

            agentloop serve --model recipes/quickstart/model --port 30000

            curl localhost:30000/generate -H "Content-Type: application/json" -d \\
              '{"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 8}}'

        A trainer changes the weights with /pause_generation,
        /update_weights_from_disk (folders under --weights-root only) and
        /continue_generation. Requests that run meanwhile are finished, and name
        the version that sampled each token. State: /health, /server_info,
        /metrics. The schema: /openapi.json.
        """
        raise typer.Exit(_serve(load_settings(model, settings, given(context, options))))

    file = Annotated[Path | None, typer.Option(help="JSON file of settings; options on the command line replace them")]
    return with_options(serve, model, model.option, [parameter("settings", file, None)])


def _serve(settings: ServerSettings) -> int:
    # Before torch is imported: it sizes its thread pools once.
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(settings.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with uncollected():
        from rollout_server.launch import serve

    return serve(settings)
