"""Convert fine-tuning rows to the form that chat templates expect, or refuse them.

Accepted beside plain `{messages, tools}`:

* `tools` and the `arguments` of a call as JSON text: a parquet column cannot hold objects of
  different shapes;
* calls without the wrapper `{"type": "function", "function": ...}`, and calls and results without
  ids;
* content that is null (beside calls) or a list of text parts;
* `train: false` or `weight: 0` on an assistant message: context without loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from agentloop.data import ROLES, open_rows, without_nulls
from agentloop.errors import DataError
from agentloop.types import Message

FLAGS = ("train", "weight")
"""Keys of a message that control its loss. Removed before rendering."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys that data sets use for reasoning; templates get the first."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in the form of chat templates, and for each message whether it has a loss."""

    messages: list[Message]
    trained: list[bool]
    tools: list[dict[str, Any]] | None


def read_rows(source: str | Sequence[str], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over the rows of any source of `open_rows`, with their names for messages.

    Args:
        key: the config key of the source, for messages.

    Raises:
        DataError: a row is not an object; file and row are named.
    """
    rows = open_rows(source, key)
    for index in range(len(rows)):
        row = rows[index]
        if not isinstance(row, dict):
            raise DataError(f"{rows.where(index)} is not an object", "write one JSON object a row")
        yield rows.where(index), without_nulls(row) if rows.fills_nulls(index) else row


def conversation_of(row: dict[str, Any], where: str) -> Conversation:
    """Return the conversation of a row `{messages, tools?}`.

    Raises:
        DataError: the row cannot be used; row and message are named.
    """
    if row.get("images") or row.get("videos"):
        raise DataError(f"{where} has images", IMAGES)

    messages = _decoded(row["messages"], f"{where}: messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: column 'messages' is not a list of messages", "write [{role, content}, ...]")

    tools = _decoded(row.get("tools") or None, f"{where}: tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(
            f"{where}: column 'tools' is not a list of schemas", "write [{type: function, function: {...}}]"
        )

    shown: list[Message] = []
    trained = []
    for number, message in enumerate(messages, 1):
        place = f"{where}, message {number}"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise DataError(f"{place} has the role {role!r}", f"use one of {', '.join(ROLES)}")
        trained.append(_is_trained(message, place))
        shown.append(_message(message, len(shown), place))

    _name_results(shown)
    return Conversation(shown, trained, tools or None)


IMAGES = "the trainer supports text only: remove these rows"


def _decoded(value: Any, where: str) -> Any:
    """Decode a value that may be JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as exc:
        raise DataError(f"{where} is text that is not JSON: {exc}", "write valid JSON, or the object itself") from exc


def _is_trained(message: dict[str, Any], place: str) -> bool:
    train, weight = message.get("train"), message.get("weight")
    if train not in (None, True, False) or weight not in (None, 0, 1):
        raise DataError(
            f"{place} has train {train!r} and weight {weight!r}", "set train to true or false, weight to 0 or 1"
        )
    if message["role"] != "assistant":
        if train or weight:
            raise DataError(f"{place} of role {message['role']} is marked for training", "mark only assistant messages")
        return False
    return train is not False and weight != 0


def _message(message: dict[str, Any], position: int, place: str) -> Message:
    shown = {key: value for key, value in message.items() if key not in FLAGS and value is not None}
    shown["content"] = _content(message.get("content"), place)

    reasoning = [text for key in REASONING if (text := shown.pop(key, None))]
    if reasoning:
        shown["reasoning_content"] = reasoning[0]

    if "function_call" in shown:
        raise DataError(f"{place} has a function_call", "write tool_calls: [{type: function, function: {...}}]")
    calls = _decoded(shown.pop("tool_calls", None) or None, f"{place}: tool_calls")
    if calls:
        if message["role"] != "assistant":
            raise DataError(f"{place} of role {message['role']} has tool calls", "only the assistant calls tools")
        shown["tool_calls"] = [_call(call, f"c{position:04d}{n:04d}", place) for n, call in enumerate(calls)]
    return shown  # type: ignore[return-value]  # a dict with the keys of a Message


def _content(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise DataError(f"{place} has content that is not text", "write a string, or a list of text parts")
    for part in content:
        if not isinstance(part.get("text"), str):
            raise DataError(f"{place} has a part of type {part.get('type')!r}", IMAGES)
    return "".join(part["text"] for part in content)


def _call(call: Any, call_id: str, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{place} has a tool call without a name", "write {function: {name, arguments}}")
    arguments = _decoded(function.get("arguments") or {}, f"{place}: the arguments of {function['name']}")
    if not isinstance(arguments, dict):
        raise DataError(f"{place}: the arguments of {function['name']} are not an object", "write {argument: value}")
    shown = {"name": function["name"], "arguments": arguments}
    return {"type": "function", "id": str(call.get("id") or call_id), "function": shown}


def _name_results(messages: list[Message]) -> None:
    """Give results the name and id of the calls they answer, in order, as an agent loop does."""
    calls: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "assistant":
            calls = list(message.get("tool_calls", ()))  # type: ignore[arg-type]  # the dicts made by _call
        elif message["role"] == "tool" and calls:
            named = message.get("tool_call_id")
            call = next((call for call in calls if call["id"] == named), None) if named else calls[0]
            if call is not None:
                calls.remove(call)
                message.setdefault("tool_call_id", call["id"])
                message.setdefault("name", call["function"]["name"])
