"""`agentloop serve`, and the same options behind `python -m rollout_server`.

The options are generated from the fields of `ServerSettings`.
"""

from __future__ import annotations

import inspect
import os
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

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
        given = {name: value for name, value in options.items() if _is_given(context, name)}
        raise typer.Exit(_serve(load_settings(model, settings, given)))

    file = Annotated[Path | None, typer.Option(help="JSON file of settings; options on the command line replace them")]
    parameters = [
        _parameter("context", typer.Context),
        # Required options first.
        *(_option(model, name, field) for name, field in model.model_fields.items() if field.is_required()),
        *(_option(model, name, field) for name, field in model.model_fields.items() if not field.is_required()),
        _parameter("settings", file, None),
    ]
    # typer reads the options of a command from its signature and annotations.
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # any function may have one
    serve.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return serve


def _option(model: type[ServerSettings], name: str, field: FieldInfo) -> inspect.Parameter:
    """Return the parameter of one field. The pydantic model validates its value."""
    kind, choices = _kind(field.annotation)
    help_text = (field.description or "").replace("null: ", "default: ")
    option = model.option(name)
    if kind is bool:
        option += f"/--no-{option.removeprefix('--')}"

    default = None if field.is_required() else field.get_default(call_default_factory=True)
    info = typer.Option(
        option,
        help=help_text + ("; repeat for more" if typing.get_origin(kind) is list else ""),
        metavar=f"[{'|'.join(choices)}]" if choices else None,
        show_default="required" if field.is_required() else default not in (None, (), []),
    )
    return _parameter(
        name, Annotated[kind | None, info], default or None if typing.get_origin(kind) is list else default
    )


def _kind(annotation: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the type of an option's value, and the values to choose from if they are few."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    kind = next(option for option in options if option is not types.NoneType)
    if typing.get_origin(kind) is typing.Literal:
        return str, typing.get_args(kind)
    if typing.get_origin(kind) in (list, tuple):
        return list[typing.get_args(kind)[0]], ()  # type: ignore[misc]  # a type that is made at run time
    return kind, ()


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _serve(settings: ServerSettings) -> int:
    # Before torch is imported: it sizes its thread pools once.
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(settings.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with uncollected():
        from rollout_server.launch import serve

    return serve(settings)
