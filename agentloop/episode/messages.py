"""Messages of agents and interactions, in the one form that templates, images and traces expect."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from agentloop.types import Message


def plain_messages(messages: Iterable[Message]) -> list[Message]:
    """Return messages whose content is text, or a list of parts that are objects.

    Agents also give what other libraries take: a content that is None, as beside tool calls, texts
    as parts, tool calls that are None or without `function` around them. A message that is in this
    form already is the same object.

    Raises:
        ValueError: a message has no role, or content or tool calls of another kind.
    """
    return [message if _is_plain(message) else _plain(message) for message in messages]


def _is_plain(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and type(message.get("content")) is str
        and isinstance(message.get("role"), str)
        and "tool_calls" not in message
    )


def _plain(message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{message!r:.200} is not a message: write {{'role': ..., 'content': ...}}")
    if "tool_calls" in message:
        message = _with_calls(message)
    content = message.get("content")
    if content is None:
        return cast("Message", {**message, "content": ""})
    if type(content) is str:
        return cast("Message", message)
    if not isinstance(content, list | tuple):
        raise ValueError(
            f"a message of role {message['role']} has content of type {type(content).__name__}: give text, or a list "
            "of parts {'type': 'text', 'text': ...} and {'type': 'image', 'image': ...}"
        )
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return cast("Message", message)
    return cast("Message", {**message, "content": [_part(part, message["role"]) for part in content]})


def _part(part: Any, role: str) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise ValueError(f"a message of role {role} has a part of type {type(part).__name__}: give text or an object")
    return part


def _with_calls(message: dict[str, Any]) -> dict[str, Any]:
    calls = message["tool_calls"]
    if calls is None:
        return {key: value for key, value in message.items() if key != "tool_calls"}
    if not isinstance(calls, list | tuple):
        raise ValueError(f"a message of role {message['role']} has tool_calls of type {type(calls).__name__}: {_CALLS}")
    found = [call if _is_call(call) else _call(call, message["role"]) for call in calls]
    same = isinstance(calls, list) and all(one is other for one, other in zip(found, calls, strict=True))
    return message if same else {**message, "tool_calls": found}


_CALLS = "write [{'type': 'function', 'id': ..., 'function': {'name': ..., 'arguments': {...}}}]"


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    return function.get("arguments") is not None


def _call(call: Any, role: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"a message of role {role} has a tool call without a name: {_CALLS}")
    arguments = function.get("arguments")
    around = {key: value for key, value in call.items() if key not in ("name", "arguments", "function")}
    shown = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    return {"type": "function", **around, "function": shown}
