"""Arguments that a model writes as bare text between tags: find their type and their end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentloop.chat.call_json import CallError, read_json
from agentloop.chat.formats.base import Tools
from agentloop.chat.sampled import SampledText

MOST_CLOSINGS = 64
"""Maximum closing tags tried for one value, which may contain some: bounds the parsing time."""

_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
_PYTHON = {"True": True, "False": False, "None": None}


def schemas_of(tools: Tools, name: str) -> dict[str, Any]:
    """Return the schemas of a tool's arguments, by argument; empty if the tool is not offered."""
    for tool in tools:
        function = tool.get("function") or {}
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties")
            return properties if isinstance(properties, dict) else {}
    return {}


def types_of(schema: Any) -> frozenset[str] | None:
    """Return the JSON types that a schema allows; None if it names no type."""
    if not isinstance(schema, dict):
        return None

    given = schema.get("type")
    types = {given} if isinstance(given, str) else set(given) if isinstance(given, list) else set()
    for branch in [*(schema.get("anyOf") or []), *(schema.get("oneOf") or [])]:
        inner = types_of(branch)
        if inner is None:
            return None
        types |= inner

    # A schema without a type may list its values.
    if not types:
        types = {
            _kind(value) for value in [*(schema.get("enum") or []), *([schema["const"]] if "const" in schema else [])]
        }

    if not types or not types <= {*_KINDS.values(), "null"}:
        return None
    return frozenset(types | {"null"}) if schema.get("nullable") is True else frozenset(types)


def read_typed(
    turn: SampledText, start: int, closing: str, followers: Sequence[str], schema: Any, *, own_lines: bool
) -> tuple[Any, int]:
    """Read the value that begins at `start`; return it and the position after its closing tag.

    A string is the text itself; any other value is JSON, or Python's True, False or None. If the
    schema gives no type, JSON other than a string is read as JSON, and anything else is text.

    Args:
        turn: the sampled turn.
        start: where the value begins.
        closing: the tag after the value.
        followers: the tags that may follow the closing tag, after white space. A closing tag that
            none of them follows belongs to the value.
        schema: the JSON schema of the argument, or None.
        own_lines: the value is on its own lines; the newlines around it are not part of it.

    Raises:
        CallError: the value does not end, or does not have the type that the schema gives.
    """
    types = types_of(schema)
    fault = ""
    if types is None or types - {"string"}:
        try:
            # The JSON determines where it ends: a string in it may contain the closing tag.
            value, end = read_json(turn.text, start)
            place = turn.skip_space(end)
            if turn.at(closing, place) and _is_meant(value, types):
                return value, place + len(closing)
            fault = "text after the JSON value"
        except CallError as exc:
            fault = str(exc)

    end = _end(turn, start, closing, followers)
    if end < 0:
        raise CallError(f"cut off before {closing}")

    text = turn.text[start:end]
    on = end + len(closing)
    if own_lines:
        text = text.removeprefix("\n").removesuffix("\n")

    word = text.strip()
    if types and word in _PYTHON and _kind(_PYTHON[word]) in types:
        return _PYTHON[word], on
    if types is None or "string" in types:
        return text, on
    raise CallError(f"it must be of type {' or '.join(sorted(types))}, written as JSON: {fault}")


def _is_meant(value: Any, types: frozenset[str] | None) -> bool:
    """Whether a value that parses as JSON is meant as JSON, not as text that looks like it."""
    kind = _kind(value)
    if types is None:
        return kind != "string"
    return "string" not in types or (kind != "string" and (kind in types or (kind == "integer" and "number" in types)))


def _end(turn: SampledText, start: int, closing: str, followers: Sequence[str]) -> int:
    """Return the position of the first closing tag that is followed by one of the followers."""
    first = place = turn.find(closing, start)
    for _ in range(MOST_CLOSINGS):
        if place < 0:
            break
        after = turn.skip_space(place + len(closing))
        if any(turn.at(follower, after) for follower in followers):
            return place
        place = turn.find(closing, place + len(closing))
    return first


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS[type(value)]
