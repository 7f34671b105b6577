"""Documentation of the recipe's keys, generated from the config models so that it cannot drift."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from agentloop.config.keys import fields_of, section_of


def describe(model: type[BaseModel], prefix: str = "", _path: str = "", _optional: str = "") -> Iterator[str]:
    """Yield a line `key = default   # meaning` for every key that starts with `prefix`, and a line
    `# key: meaning` for every section."""
    for name, info in fields_of(model).items():
        key = f"{_path}{name}"
        section, kind = section_of(info.annotation)
        if section is not None:
            if not prefix and not _path:
                yield ""
            if (key + ".").startswith(prefix) or prefix.startswith(key):
                meaning = (section.__doc__ or "").strip().splitlines()[0]
                if _may_be_null(info) and info.description:  # which says what that means
                    meaning += f" {info.description[0].upper()}{info.description[1:]}"
                yield f"# {key}: {meaning}"

            place = "<n>." if typing.get_origin(info.annotation) is list else "<name>."  # stages.0, agents.tool_agent
            optional = key if _may_be_null(info) else _optional
            yield from describe(section, prefix, f"{key}." + ("" if kind == "one" else place), optional)
        elif key.startswith(prefix):
            yield f"{key + ' = ' + _default(info, _optional):58} # {info.description or name}"


def _may_be_null(info: Any) -> bool:
    return not info.is_required() and types.NoneType in typing.get_args(info.annotation)


def _default(info: Any, optional: str) -> str:
    """Return the default of a key as text.

    Args:
        optional: the section around the key that a recipe may leave out; empty: none.
    """
    if info.is_required():
        return f"(required unless {optional} is null)" if optional else "(required)"
    value = info.get_default(call_default_factory=True)
    if value is PydanticUndefined or value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
