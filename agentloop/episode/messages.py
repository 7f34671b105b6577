"""Messages of agents and interactions, in the one form that templates, images and traces expect."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from agentloop.types import Message


def plain_messages(messages: Iterable[Message]) -> list[Message]:
    """Return messages whose content is text, or a list of parts that are objects.

    Agents also give what other libraries take: a content that is None, as beside tool calls, and
    texts as parts. A message that is in this form already is the same object.

    Raises:
        ValueError: a message has no role, or content of another kind.
    """
    return [message if _is_plain(message) else _plain(message) for message in messages]


def _is_plain(message: Any) -> bool:
    return isinstance(message, dict) and type(message.get("content")) is str and isinstance(message.get("role"), str)


def _plain(message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{message!r:.200} is not a message: write {{'role': ..., 'content': ...}}")
    content = message.get("content")
    if content is None:
        return cast("Message", {**message, "content": ""})
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
