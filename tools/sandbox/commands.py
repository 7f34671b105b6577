"""`agentloop sandbox serve`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from pydantic import ValidationError

from agentloop.commands.options import given, with_options
from agentloop.errors import ConfigError
from tools.sandbox.settings import SandboxSettings


def register(app: typer.Typer) -> None:
    """Add the sandbox's commands to the `agentloop` program."""
    sandbox = typer.Typer(help="Run programs of models in isolation.", no_args_is_help=True)
    sandbox.callback()(_group)
    sandbox.command("serve")(serve_command())
    app.add_typer(sandbox, name="sandbox")


def _group() -> None:
    """Run programs of models in isolation."""


def serve_command() -> Callable[..., None]:
    """Return the `serve` command, with one option for each field of the settings."""

    def serve(context: typer.Context, **options: Any) -> None:
        """Serve a code sandbox with Sandbox Fusion's API.

        Try it:

            agentloop sandbox serve --port 8080

            curl localhost:8080/run_code -H "Content-Type: application/json" -d \\
              '{"code": "print(6 * 7)", "language": "python"}'

        Each program runs in bubblewrap: without network, with a read-only
        system, in namespaces of its own, within limits. State: /health,
        /metrics. The schema: /openapi.json.
        """
        from tools.sandbox.serving import serve as start

        raise typer.Exit(start(_settings(given(context, options))))

    return with_options(serve, SandboxSettings, _option)


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def _settings(options: dict[str, Any]) -> SandboxSettings:
    try:
        return SandboxSettings(**options)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        option = _option(str(first["loc"][0])) if first["loc"] else "the options"
        raise ConfigError(
            f"{option}: {first['msg']}, not {first['input']!r}", "agentloop sandbox serve --help"
        ) from exc
