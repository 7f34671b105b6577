"""Tool-role emulation: tools for chat templates that do not support them.

Results become user messages, and the tools are described in the system message, or in front of the
first user message if the template has no system role either (Gemma 2). It is meant for templates
without a tool role (Gemma 3, Phi 3.5) and is switched on with `model.tool_role: user`.
The model reads and writes calls in the hermes format, so the hermes parser reads them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from agentloop.chat.continuation.tool_images import Content, joined, text_of
from agentloop.types import Message

INTRODUCTION = (
    "You can use these tools:\n{schemas}\n\n"
    "To use one, write:\n<tool_call>\n"
    '{{"name": "the tool\'s name", "arguments": {{"an argument": "its value"}}}}\n'
    "</tool_call>\n"
    "Its result comes to you between <tool_response> and </tool_response>."
)


def emulate_tool_role(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, *, system_role: bool = True
) -> list[Message]:
    """Return the conversation with tool messages, calls and schemas written into the other
    messages.

    Consecutive results, and a user message after them, become one user message, because templates
    of this kind often require that roles alternate.

    Args:
        messages: the conversation, or a part of it.
        tools: the schemas to describe; None: they were described before.
        system_role: the template shows system messages; otherwise their text leads the first user
            message.
    """
    emulated: list[Message] = []
    results: list[Content] = []
    for message in messages:
        if message["role"] == "tool":
            results.append(joined(["<tool_response>\n", message["content"], "\n</tool_response>"], ""))
            continue

        if results:
            if message["role"] == "user":
                message = {**message, "content": joined([*results, message["content"]], "\n")}
            else:
                emulated.append({"role": "user", "content": joined(results, "\n")})
            results = []
        emulated.append(_without_calls(message))

    if results:
        emulated.append({"role": "user", "content": joined(results, "\n")})

    emulated = _introduce(emulated, tools) if tools else emulated
    return emulated if system_role else _without_system(emulated)


def _introduce(messages: list[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """Describe the tools in the system message, which is added if there is none."""
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    introduction = INTRODUCTION.format(schemas=schemas)
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{_text(messages[0])}\n\n{introduction}"}, *messages[1:]]
    return [{"role": "system", "content": introduction}, *messages]


def _without_system(messages: list[Message]) -> list[Message]:
    """Write a system message at the beginning in front of the first user message."""
    if not messages or messages[0]["role"] != "system":
        return messages

    first, rest = _text(messages[0]), messages[1:]
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": first}, *rest]
    content = rest[0]["content"]
    if isinstance(content, list):
        return [{**rest[0], "content": [{"type": "text", "text": f"{first}\n\n"}, *content]}, *rest[1:]]
    return [{**rest[0], "content": f"{first}\n\n{content}"}, *rest[1:]]


def _without_calls(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message["tool_calls"]
    ]
    text = "\n".join(part for part in (_text(message), *calls) if part)
    return {"role": message["role"], "content": text}


def _text(message: Message) -> str:
    return text_of(message["content"])
