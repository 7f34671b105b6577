"""Arguments that a model writes as bare text between tags: find their type and their end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentloop.chat.call_json import CallError, read_json
from agentloop.chat.formats.base import Tools
from agentloop.chat.formats.values import read_value
from agentloop.chat.sampled import SampledText

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
    turn: SampledText,
    start: int,
    closing: str,
    followers: Sequence[str],
    schema: Any,
    *,
    tags: Sequence[str],
    own_lines: bool,
) -> tuple[Any, int]:
    """Read the value that begins at `start`; return it and the position after its closing tag.

    A string is the text itself; any other value is JSON or a Python literal. If the schema gives no
    type, JSON other than a string is read as JSON, and anything else is text.

    Text ends at the first tag of the grammar. If that is one of the followers, the closing tag was
    forgotten, and the value ends where the follower begins.

    Args:
        turn: the sampled turn.
        start: where the value begins.
        closing: the tag after the value.
        followers: the tags that may follow the closing tag, after white space: that of the next
            argument, and the one that ends the arguments.
        schema: the JSON schema of the argument, or None.
        tags: every tag of the grammar.
        own_lines: the value is on its own lines; the newlines around it are not part of it.

    Raises:
        CallError: the value does not end, contains another tag or a control token, or does not have
            the type that the schema gives.
    """
    types = types_of(schema)
    fault = ""
    if types is None or types - {"string"}:
        try:
            # The JSON determines where it ends: a string in it may spell the closing tag.
            value, end = _json(turn, start, strict=types is None or "string" in types)
            place = turn.skip_space(end)
            if _is_meant(value, types):
                if turn.at(closing, place):
                    return value, place + len(closing)
                if any(turn.at(tag, place) for tag in followers):
                    return value, place
            fault = "text after the JSON value"
        except CallError as exc:
            fault = str(exc)

    end, on = _end(turn, start, closing, followers, tags)
    text = turn.text[start:end]
    if own_lines:
        text = text.removeprefix("\n")
    if own_lines or on == end:
        text = text.removesuffix("\n")  # the newline before the next tag is not part of the value

    word = text.strip()
    if types and word in _PYTHON and _kind(_PYTHON[word]) in types:
        return _PYTHON[word], on
    if types is None or "string" in types:
        return text, on
    raise CallError(f"it must be of type {' or '.join(sorted(types))}, written as JSON: {fault}")


def _json(turn: SampledText, start: int, *, strict: bool) -> tuple[Any, int]:
    """Read the value at `start`; strictly if it may be text as well."""
    if not strict:
        return read_value(turn, start)
    text, offset = turn.stretch(start)
    value, end = read_json(text, start - offset)
    return value, end + offset


def _end(turn: SampledText, start: int, closing: str, followers: Sequence[str], tags: Sequence[str]) -> tuple[int, int]:
    """Return the end of the text at `start`, and the position after its closing tag: the same if
    the tag was forgotten.
    """
    control, spelling = turn.next_control(start)
    end, tag = turn.find_first({closing, *tags}, start) or (len(turn), "")
    if control < end:
        raise CallError(f"cut off before {closing}: {spelling} must not stand within a value")
    if not tag:
        raise CallError(f"cut off before {closing}")
    if tag == closing:
        return end, end + len(closing)
    if tag in followers:
        return end, end
    raise CallError(f"cut off before {closing}: {tag} must not stand within a value")


def _is_meant(value: Any, types: frozenset[str] | None) -> bool:
    """Whether a value that parses as JSON is meant as JSON, not as text that looks like it."""
    kind = _kind(value)
    if types is None:
        return kind != "string"
    return "string" not in types or (kind != "string" and (kind in types or (kind == "integer" and "number" in types)))


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS[type(value)]
