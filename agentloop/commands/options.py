"""The options of a command, made from the fields of a pydantic model.

A field is one option: its description is the help text, its default the option's, and the model
checks the value. `rollout_server` and the servers behind tools make their commands with it.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

Parameter = inspect.Parameter


def with_options(
    command: Callable[..., None],
    model: type[BaseModel],
    option: Callable[[str], str],
    further: Sequence[Parameter] = (),
) -> Callable[..., None]:
    """Give a command the signature that typer reads its options from.

    Args:
        command: takes `context`, one keyword for each field, and those of `further`.
        option: the option of a field, such as `--max-running`.
        further: parameters after those of the fields.
    """
    fields = model.model_fields.items()
    parameters = [
        parameter("context", typer.Context),
        # Required options first.
        *(_of_field(option(name), name, field) for name, field in fields if field.is_required()),
        *(_of_field(option(name), name, field) for name, field in fields if not field.is_required()),
        *further,
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # any function may have one
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def parameter(name: str, annotation: Any, default: Any = Parameter.empty) -> Parameter:
    """Return a parameter of a command."""
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def given(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the command line gives, without defaults."""

    def is_given(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name != "DEFAULT"

    return {name: value for name, value in options.items() if is_given(name)}


def _of_field(option: str, name: str, field: FieldInfo) -> Parameter:
    """Return the parameter of one field. The pydantic model validates its value."""
    kind, choices = _kind(field.annotation)
    help_text = (field.description or "").replace("null: ", "default: ")
    if kind is bool:
        option += f"/--no-{option.removeprefix('--')}"

    default = None if field.is_required() else field.get_default(call_default_factory=True)
    info = typer.Option(
        option,
        help=help_text + ("; repeat for more" if typing.get_origin(kind) is list else ""),
        metavar=f"[{'|'.join(choices)}]" if choices else None,
        show_default="required" if field.is_required() else default not in (None, (), []),
    )
    return parameter(
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
