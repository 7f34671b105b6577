"""`<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{..}<|call|>`: gpt-oss.

A turn is one or more messages: a header, `<|message|>`, the content, and a token that ends the
message. The `<|start|>assistant` of the first one belongs to the prompt. A header names a channel,
and a recipient if the message is a call; the recipient comes before or after the channel.
"""

from __future__ import annotations

import re
from typing import Any

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import Tools, read_object, report
from agentloop.chat.formats.values import skip_value
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn, ToolCall

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
ANALYSIS = "analysis"
FUNCTIONS = "functions."
CODE = "python"
"""The recipient of program text instead of JSON: a call with the single argument `code`."""

NO_TOOL = ("", "all", "assistant", "user")
"""Recipients that are not tools."""

_TO = r"to=([^\s<|]*)"
_BEFORE_CHANNEL = re.compile(rf"(?:assistant\b)?\s*{_TO}")
_IN_CHANNEL = re.compile(rf"(?:^|\s){_TO}")


class HarmonyFormat:
    """Messages in channels: analysis is reasoning, a recipient makes a call, the rest is text."""

    name = "harmony"
    tags = (START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)

    def parse(self, turn: SampledText, tools: Tools | None = None, *, reasoning_open: bool = False) -> ParsedTurn:
        """Read one turn; an unreadable call is returned as malformed, with the reason."""
        parsed = ParsedTurn(text="")
        texts: list[str] = []
        reasoning: list[str] = []
        position = 0
        if reasoning_open:
            position = _stop(turn, 0)
            reasoning.append(turn.text[:position])
            position = _after_end(turn, position)

        while position < len(turn):
            message, tag = _header_end(turn, position)
            stray = _stray(turn, position, message)
            channel, recipient = _header(turn, position, message)
            if stray and (recipient or "to=" in turn.text[position:message]):
                stop = _stop(turn, message + len(tag))
                reason = f"{stray} must not stand within the header of a call"
                position = _after_end(turn, report(turn, (position, stop), reason, parsed))
                continue
            if tag != MESSAGE:
                # The header was cut off: a malformed call if it has a recipient. Text without a
                # header is an answer.
                if recipient:
                    reason = f"cut off before {MESSAGE}"
                    message = report(turn, (position, message), reason, parsed)
                elif channel is None:
                    texts.append(turn.text[position:message])
                position = _after_end(turn, message)
                continue

            content = message + len(MESSAGE)
            if recipient:
                stop = _read_call(turn, content, recipient, parsed)
            else:
                stop = _stop(turn, content)
                (reasoning if channel == ANALYSIS else texts).append(turn.text[content:stop])
            position = _after_end(turn, stop)

        parsed.text = "\n".join(filter(None, map(str.strip, texts)))
        parsed.reasoning = "\n".join(filter(None, map(str.strip, reasoning))) or None
        return parsed


def _header_end(turn: SampledText, start: int) -> tuple[int, str]:
    """Return where the header at `start` ends, and the tag there; empty if the turn ends."""
    begin = start + len(START) * turn.at(START, start)
    return turn.find_first((MESSAGE, START, *ENDS), begin) or (len(turn), "")


def _stray(turn: SampledText, start: int, end: int) -> str:
    """Return a control token that does not belong into the header from `start` to `end`, or an
    empty string.
    """
    place, spelling = turn.next_control(start)
    while place < end:
        if spelling not in (START, CHANNEL, CONSTRAIN):
            return spelling
        place, spelling = turn.next_control(place + 1)
    return ""


def _header(turn: SampledText, start: int, end: int) -> tuple[str | None, str | None]:
    """Return channel and recipient of the header from `start` to `end`; None for a missing one."""
    typed = turn.find(CONSTRAIN, start, end)
    end = typed if typed >= 0 else end
    if turn.at(START, start):
        start += len(START)

    at = turn.find(CHANNEL, start, end)
    role, named = (turn.text[start:at], turn.text[at + len(CHANNEL) : end]) if at >= 0 else (turn.text[start:end], "")
    found = _BEFORE_CHANNEL.fullmatch(role.strip()) or _IN_CHANNEL.search(named)
    recipient = found[1] if found and found[1] not in NO_TOOL else None
    words = named.split()
    return (None if at < 0 else words[0] if words else ""), recipient


def _read_call(turn: SampledText, start: int, recipient: str, parsed: ParsedTurn) -> int:
    """Read the call whose arguments begin at `start`; return where its message ends."""
    name = recipient.removeprefix(FUNCTIONS)
    end = start
    try:
        stop = _stop(turn, start)
        if stop < len(turn) and not turn.text[start:stop].strip():
            arguments: dict[str, Any] = {}
        else:
            arguments, end = read_object(turn, start)
            stop = _stop(turn, end)
        if turn.text[end:stop].strip():
            raise CallError("text after the JSON object")
        if not name:
            raise CallError(f"to={FUNCTIONS} must be followed by the tool's name")
    except CallError as exc:
        stop = _stop(turn, skip_value(turn, turn.skip_space(start), exc) if end == start else end)
        body = turn.text[start:stop].strip()
        if recipient != CODE or not body or turn.next_control(start)[0] < stop:
            return report(turn, (start, stop), exc, parsed)
        arguments = {"code": body}
    parsed.tool_calls.append(ToolCall(name, arguments))
    return stop


def _stop(turn: SampledText, start: int) -> int:
    """Return where the content at `start` ends."""
    found = turn.find_first((*ENDS, START, CHANNEL), start)
    return found[0] if found else len(turn)


def _after_end(turn: SampledText, position: int) -> int:
    """Return the position after the token that ends a message, where the next one begins."""
    for tag in ENDS:
        if turn.at(tag, position):
            position += len(tag)
            break
    return turn.skip_space(position)
