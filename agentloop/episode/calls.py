"""Run a turn's tool calls concurrently, cut the results, and write them as messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from agentloop.chat import ChatRenderer
from agentloop.chat.template import texts
from agentloop.config import AgentConfig
from agentloop.episode.images import ImageLoader
from agentloop.errors import ImageError, ToolUnavailable
from agentloop.tool.session import ToolSession, bad_image
from agentloop.trace.spans import span
from agentloop.types import Message, ToolCall, ToolResult, Turn

UNREADABLE = "unreadable_call"
"""Tool name in the answer to a malformed call: some templates write one beside each result."""


UNAVAILABLE = "unavailable"
"""Attribute of a tool call's span: the episode failed because the tool could not be reached."""

CHARACTERS_PER_TOKEN = 16
"""Output is read in pieces of this many characters a token; text has about four, code three."""

MARGIN = 64
"""Tokens behind the cut: the end of a piece may be tokenized differently than in the whole text."""

INLINE_CHARACTERS = 16_384
"""Longer pieces are tokenized in a thread: they would hold the event loop for 10 ms and more."""


async def run_calls(
    session: ToolSession, calls: Sequence[ToolCall], config: AgentConfig, images: ImageLoader
) -> list[ToolResult]:
    """Run calls, at most `max_parallel_calls` at once; return the results in order.

    Raises:
        ToolError: a tool's machinery failed, or it returned an image that cannot be decoded.
    """
    if len(calls) == 1:  # by far the most frequent case; a task would only cost time
        return [await _call(session, calls[0], config, images)]

    running = asyncio.Semaphore(config.max_parallel_calls)

    async def one(call: ToolCall) -> ToolResult:
        async with running:
            return await _call(session, call, config, images)

    return await _all_or_none([one(call) for call in calls])


async def _call(session: ToolSession, call: ToolCall, config: AgentConfig, images: ImageLoader) -> ToolResult:
    with span("tool", tool=call.name, call_id=call.id) as running:
        try:
            result = await session.call(call, config.tool_timeout_s)
        except ToolUnavailable:
            running.set(**{UNAVAILABLE: True})
            raise
        for number, image in enumerate(result.images or (), 1):  # here, so that the call ends as an error
            try:
                await images.file(image)
            except ImageError as exc:
                raise bad_image(call.name, number, exc) from exc
        if result.error is not None:
            running.fail(result.error)
        if result.reward is not None:
            running.set(score=result.reward)
        return result


async def _all_or_none(coroutines: Sequence[Coroutine[Any, Any, ToolResult]]) -> list[ToolResult]:
    """Return results in order. If one raises, cancel and await the others, then raise it."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def result_message(call: ToolCall, result: ToolResult, text: str) -> Message:
    """Return the message that shows a result to the model; `text` is its text, already cut."""
    message: Message = {"role": "tool", "name": call.name, "content": text}
    if call.id:
        message["tool_call_id"] = call.id
    if result.images:
        images = [{"type": "image", "image": image} for image in result.images]
        message["content"] = [*images, {"type": "text", "text": text}]
    return message


def malformed_messages(turn: Turn, renderer: ChatRenderer) -> list[Message]:
    """Return a message for each malformed call of a turn, with the reason why it was not run."""
    return [
        {
            "role": "tool",
            "name": UNREADABLE,
            "tool_call_id": renderer.call_id("", turn.order, number),
            "content": f"Error: the tool call could not be read: {call.reason}",
        }
        for number, call in enumerate(turn.malformed_calls, len(turn.tool_calls))
    ]


def assistant_message(turn: Turn) -> Message:
    """Return a sampled turn as a message."""
    message: Message = {"role": "assistant", "content": turn.text}
    if turn.tool_calls:
        message["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in turn.tool_calls
        ]
    if turn.reasoning is not None:
        message["reasoning_content"] = turn.reasoning
    return message


async def cut_output(text: str, limit: int, renderer: ChatRenderer) -> str:
    """Cut tool output to `limit` tokens, and mark the cut for the model.

    Only the beginning of a long text is tokenized, and off the event loop if it is long itself. It
    ends well behind the last token that is kept, so that the cut equals that of the whole text.
    """
    begin = CHARACTERS_PER_TOKEN * (limit + MARGIN)
    while True:
        head = text[:begin].encode("utf-8", "replace").decode()  # a lone surrogate cannot be encoded
        whole = begin >= len(text)
        if whole and len(head) * 4 <= limit:  # a character has at most four bytes, and a token at least one
            return head
        ids = await _encode(head, renderer)
        if whole or len(ids) >= limit + MARGIN:
            break
        begin *= 4

    if whole and len(ids) <= limit:
        return head
    shown = renderer.decode(ids[:limit]).rstrip("\ufffd")
    if whole:
        return f"{shown}\n[cut: the first {limit} of {len(ids)} tokens are shown]"
    return f"{shown}\n[cut: the first {limit} tokens of {len(text)} characters are shown]"


async def _encode(text: str, renderer: ChatRenderer) -> list[int]:
    if len(text) <= INLINE_CHARACTERS:
        return renderer.encode_text(text)
    return await asyncio.to_thread(renderer.encode_text, text)


async def off_loop_if_long(messages: Sequence[Message], render: Callable[..., list[int]], *args: Any) -> list[int]:
    """Return `render(*args)`, off the event loop if the messages are long."""
    if sum(map(len, texts(list(messages)))) <= INLINE_CHARACTERS:
        return render(*args)
    return await asyncio.to_thread(render, *args)
