"""Read the messages of a row in the shapes in which data sets hold them, or refuse them by place.

Rows of reinforcement learning and of fine-tuning are read alike. Accepted beside plain
`{role, content}`:

* content that is null beside tool calls or reasoning, and null in a tool's result;
* content as a list of parts; parts of text alone are joined, since most templates take only text;
* the `arguments` of a call, or a whole column, as JSON text: a parquet column cannot hold objects
  of different shapes;
* calls without the wrapper `{"type": "function", "function": ...}`, and calls and results without
  ids;
* reasoning under any of the names that data sets use;
* null for a key that a message does not have, as parquet and pydantic write it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

from agentloop.errors import DataError
from agentloop.types import Message

ROLES = ("system", "developer", "user", "assistant", "tool")

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys that data sets use for reasoning; templates get the first."""

TEXT_TYPES = (None, "text", "input_text", "output_text")
IMAGE_TYPES = ("image", "image_url")


def decoded(value: Any, place: str) -> Any:
    """Return a value that may be given as JSON text.

    Raises:
        DataError: it is text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{place} is text that is not JSON: {exc}", "write valid JSON, or the object itself") from exc


def read_messages(value: Any, place: str, label: str, *, images: bool) -> list[Message]:
    """Return the messages of a column; results get the name and id of the calls that they answer.

    Args:
        value: a list of messages, or JSON text of one.
        place: row and column, for messages.
        label: what a message is called together with its number, for messages.
        images: whether contents may have parts with images.

    Raises:
        DataError: it cannot be used; row, message and cause are named.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = decoded(value, place)
    if not isinstance(value, list) or not value:
        raise DataError(f"{place} is not a list of messages", "write [{role, content}, ...]")

    found = [_message(message, i, f"{label} {i + 1}", images=images) for i, message in enumerate(value)]
    _name_results(found)
    return found


def without_nulls(value: Any) -> Any:
    """Remove nulls: parquet adds keys that only other messages have, and templates test for
    keys."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def strings_of(value: Any) -> Iterator[str]:
    """Yield the strings of a value at any depth, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_of(key)
            yield from strings_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item)


def _message(message: Any, position: int, place: str, *, images: bool) -> Message:
    role = message.get("role") if isinstance(message, dict) else message
    if not isinstance(message, dict) or not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{place} has the role {role!r}", f"use one of {', '.join(ROLES)}")

    shown = {key: value for key, value in message.items() if value is not None}
    reasoning = [text for key in REASONING if (text := shown.pop(key, None))]
    if reasoning:
        if not isinstance(reasoning[0], str):
            raise DataError(f"{place} has reasoning that is not text", "write a string")
        shown["reasoning_content"] = reasoning[0]

    if "function_call" in shown:
        raise DataError(f"{place} has a function_call", "write tool_calls: [{type: function, function: {...}}]")
    calls = decoded(shown.pop("tool_calls", None) or None, f"{place}: tool_calls")
    if calls:
        if role != "assistant":
            raise DataError(f"{place} of role {role} has tool calls", "only the assistant calls tools")
        if not isinstance(calls, list):
            raise DataError(f"{place}: tool_calls is not a list", "write [{function: {name, arguments}}]")
        shown["tool_calls"] = [_call(call, f"c{position:04d}{n:04d}", place) for n, call in enumerate(calls)]

    content = _content(message.get("content"), place, images=images)
    if content is None:
        if role != "tool" and not calls and not reasoning:
            raise DataError(f"{place} has no content", "write a string, or a list of parts")
        content = ""
    shown["content"] = content

    if "tool_call_id" in shown:
        shown["tool_call_id"] = str(shown["tool_call_id"])
    for key in ("name", "tool_call_id"):
        if not isinstance(shown.get(key, ""), str):
            raise DataError(f"{place} has a {key} that is not text", "write a string")
    if any(map(_is_broken, strings_of(shown))):
        raise DataError(f"{place} has text with half of a surrogate pair", "write valid Unicode")
    return cast("Message", shown)


def _content(content: Any, place: str, *, images: bool) -> str | list[dict[str, Any]] | None:
    """Return text, parts of which at least one is an image, or None if there is nothing."""
    if content is None or isinstance(content, str):
        return content
    parts = [content] if isinstance(content, dict) else content
    if not isinstance(parts, list):
        raise DataError(f"{place} has content of type {type(content).__name__}", "write a string, or a list of parts")
    shown = [part for part in (_part(part, place, images=images) for part in parts) if part is not None]
    if not shown:
        return None
    return shown if any(part["type"] != "text" for part in shown) else "".join(part["text"] for part in shown)


def _part(part: Any, place: str, *, images: bool) -> dict[str, Any] | None:
    """Return a part as templates expect it; None if it is empty."""
    if part is None or isinstance(part, str):
        return {"type": "text", "text": part} if part else None
    if not isinstance(part, dict):
        raise DataError(f"{place} has a part of type {type(part).__name__}", "write {type: text, text: ...}")

    shown = without_nulls(part)
    kind = shown.get("type")
    has_image = any(shown.get(key) for key in IMAGE_TYPES)
    if has_image and shown.get("text"):
        raise DataError(f"{place} has a part with a text and an image", "write a part for each of them")
    if kind in TEXT_TYPES and isinstance(shown.get("text"), str) and not has_image:
        return {**shown, "type": "text"}
    if kind in IMAGE_TYPES or (kind in TEXT_TYPES and any(key in shown for key in IMAGE_TYPES)):
        if images:
            return {**shown, "type": kind if kind in IMAGE_TYPES else "image"}
        raise DataError(f"{place} has a part of type {kind!r}", "only text can be used here: remove these rows")
    supported = "text and images" if images else "text"
    raise DataError(f"{place} has a part of type {kind!r}", f"only parts of {supported} can be used")


def _call(call: Any, call_id: str, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{place} has a tool call without a name", "write {function: {name, arguments}}")
    arguments = decoded(function.get("arguments") or {}, f"{place}: the arguments of {function['name']}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(f"{place}: the arguments of {function['name']} are not an object", "write {argument: value}")
    shown = {"name": function["name"], "arguments": arguments}
    return {"type": "function", "id": str(call.get("id") or call_id), "function": shown}


def _name_results(messages: list[Message]) -> None:
    """Give results the name and id of the calls they answer, in order, as an agent loop does."""
    calls: list[Any] = []
    for message in messages:
        if message["role"] == "assistant":
            calls = list(message.get("tool_calls", ()))
        elif message["role"] == "tool" and calls:
            named = message.get("tool_call_id")
            call = next((call for call in calls if call["id"] == named), None) if named else calls[0]
            if call is not None:
                calls.remove(call)
                message.setdefault("tool_call_id", call["id"])
                message.setdefault("name", call["function"]["name"])


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
