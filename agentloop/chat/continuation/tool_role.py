"""Tools for chat templates that know none: results become users' messages, and the tools are told in the system
message.

It serves templates without a tool role (Gemma 3, Phi 3.5) when the recipe says `model.tool_role: user`. What the model
reads and writes is the hermes format, so its calls are read by the parser of that name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from agentloop.types import Message

INTRODUCTION = (
    "You can use these tools:\n{schemas}\n\n"
    "To use one, write:\n<tool_call>\n"
    '{{"name": "the tool\'s name", "arguments": {{"an argument": "its value"}}}}\n'
    "</tool_call>\n"
    "Its result comes to you between <tool_response> and </tool_response>."
)


def emulate_tool_role(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> list[Message]:
    """The conversation without tool messages, tool calls and schemas; their text stands in the other messages.

    Results that follow each other, and a user's message behind them, become one user's message: templates of this kind
    often demand that roles alternate.
    """
    folded: list[Message] = []
    results: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            results.append(f"<tool_response>\n{_text(message)}\n</tool_response>")
            continue
        if results:
            if message["role"] == "user":
                message = {**message, "content": "\n".join([*results, _text(message)])}
            else:
                folded.append({"role": "user", "content": "\n".join(results)})
            results = []
        folded.append(_without_calls(message))
    if results:
        folded.append({"role": "user", "content": "\n".join(results)})
    return _introduce(folded, tools) if tools else folded


def _introduce(messages: list[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    introduction = INTRODUCTION.format(schemas=schemas)
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{_text(messages[0])}\n\n{introduction}"}, *messages[1:]]
    return [{"role": "system", "content": introduction}, *messages]


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
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content)
