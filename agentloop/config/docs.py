"""Documentation of the recipe's keys, generated from the config models so that it cannot drift."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from agentloop.config.keys import fields_of, section_of


def describe(model: type[BaseModel], prefix: str = "", _path: str = "") -> Iterator[str]:
    """Yield a line `key = default   # meaning` for every key that starts with `prefix`."""
    for name, info in fields_of(model).items():
        key = f"{_path}{name}"
        section, kind = section_of(info.annotation)
        if section is not None:
            if not prefix and not _path:
                yield ""
            if (key + ".").startswith(prefix) or prefix.startswith(key):
                yield f"# {key}: {(section.__doc__ or '').strip().splitlines()[0]}"

            place = "<n>." if typing.get_origin(info.annotation) is list else "<name>."  # stages.0, agents.tool_agent
            yield from describe(section, prefix, f"{key}." + ("" if kind == "one" else place))
        elif key.startswith(prefix):
            yield f"{key + ' = ' + _default(info):58} # {info.description or name}"


def _default(info: Any) -> str:
    if info.is_required():
        return "(required)"
    value = info.get_default(call_default_factory=True)
    if value is PydanticUndefined or value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
