"""`ToolFormat` and what formats share: reasoning, tags around a call, calls written as JSON."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from agentloop.chat.call_json import CallError, read_json
from agentloop.chat.sampled import SampledText, skip_space
from agentloop.types import MalformedCall, ParsedTurn, ToolCall

Tools = list[dict[str, Any]]
"""Tool schemas, `{"type": "function", "function": {"name": .., "parameters": {..}}}`."""


class ToolFormat(Protocol):
    """Reads tool calls from a sampled turn. It never raises, whatever the model wrote."""

    @property
    def name(self) -> str: ...

    def parse(self, turn: SampledText, tools: Tools | None = None, *, reasoning_open: bool = False) -> ParsedTurn:
        """Read one turn.

        Args:
            turn: the sampled text, without the token that ended it.
            tools: the offered schemas; formats that write arguments as untyped text take their
                types from them.
            reasoning_open: the prompt opened a block of reasoning, in which the turn begins.
        """
        ...


class BaseFormat(ABC):
    """A format that looks for calls after the reasoning. Subclasses implement `read`.

    Attributes:
        name: its name in `model.tool_format`.
        reasoning_tags: the tags around the reasoning at the beginning of a turn; None: the format
            has none.
    """

    name: str
    reasoning_tags: tuple[str, str] | None = ("<think>", "</think>")

    def parse(self, turn: SampledText, tools: Tools | None = None, *, reasoning_open: bool = False) -> ParsedTurn:
        """Read one turn; an unreadable call is returned as malformed, with the reason."""
        reasoning, said = self._split(turn, reasoning_open)
        parsed = ParsedTurn(text="", reasoning=reasoning or None)
        if said is not None:
            parsed.text = self.read(said, parsed, tools or []).strip()
        return parsed

    @abstractmethod
    def read(self, turn: SampledText, parsed: ParsedTurn, tools: Tools) -> str:
        """Add the turn's calls to `parsed`; return the text around them."""

    def _split(self, turn: SampledText, is_open: bool) -> tuple[str, SampledText | None]:
        """Return the reasoning and the turn after it; None if the reasoning was never closed."""
        if self.reasoning_tags is None:
            return "", turn

        opening, closing = self.reasoning_tags
        start = turn.skip_space(0)
        if turn.at(opening, start):  # some models open it again when the prompt already did
            start += len(opening)
        elif not is_open:
            return "", turn

        end = turn.find(closing, start)
        if end < 0:
            return turn.text[start:].strip(), None
        return turn.text[start:end].strip(), turn.cut(end + len(closing))


class TaggedFormat(BaseFormat):
    """A format whose calls are enclosed in two tags. Subclasses implement `read_call`.

    Attributes:
        opening: the tag before a call, or before a list of calls.
        closing: the tag after it.
        dropped: tags that are removed from the text around the calls.
    """

    opening: str
    closing: str
    dropped: tuple[str, ...] = ()

    def read(self, turn: SampledText, parsed: ParsedTurn, tools: Tools) -> str:
        kept: list[str] = []
        position = 0
        while (start := turn.find(self.opening, position)) >= 0:
            kept.append(self._around(turn, position, start))
            position = self.read_call(turn, start + len(self.opening), parsed, tools)
        kept.append(self._around(turn, position, len(turn)))
        return "".join(kept)

    @abstractmethod
    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        """Add the call whose body begins at `start` to `parsed`; return the position after it."""

    def _around(self, turn: SampledText, start: int, end: int) -> str:
        """Return the text between two calls, without the dropped tags."""
        if not self.dropped:
            return turn.text[start:end]

        kept: list[str] = []
        while (found := turn.find_first(self.dropped, start)) and found[0] < end:
            kept.append(turn.text[start : found[0]])
            start = found[0] + len(found[1])
        return "".join([*kept, turn.text[start:end]])

    def end_call(self, turn: SampledText, end: int) -> int:
        """Return the position after the closing tag that follows a body ending at `end`.

        Raises:
            CallError: something else follows the body.
        """
        place = turn.skip_space(end)
        if turn.at(self.closing, place):
            return place + len(self.closing)
        if turn.find(self.closing, end) < 0 or turn.at(self.opening, place):
            raise CallError(f"cut off before {self.closing}")
        raise CallError(f"text after the call: {self.closing} must follow it")

    def refuse(self, turn: SampledText, start: int, end: int, reason: str, parsed: ParsedTurn) -> int:
        """Record a malformed call; return the position after it.

        The call extends to the next closing tag.

        Args:
            start: where the body of the call begins.
            end: where it stops being readable.
            reason: shown to the model.
        """
        close = turn.find(self.closing, end)
        again = turn.skip_space(end)
        if turn.at(self.opening, again):
            # The closing tag is missing; the next call may be valid.
            stop, on = end, again
        elif close < 0:
            stop, on = len(turn), len(turn)
            reason = f"cut off before {self.closing}"
        else:
            stop, on = close, close + len(self.closing)

        parsed.malformed_calls.append(MalformedCall(turn.text[start:stop].strip(), reason))
        return on


def json_call(
    value: Any, *, name: str = "name", arguments: tuple[str, ...] = ("arguments",), call_id: str | None = None
) -> ToolCall:
    """Return the call that a JSON value describes.

    Args:
        value: the JSON value.
        name: the key of the tool's name.
        arguments: the keys that may hold the arguments; an error message names the first.
        call_id: the key of the call's id, which may be missing.

    Raises:
        CallError: the value does not describe a call.
    """
    if not isinstance(value, dict):
        raise CallError("the call is not a JSON object")
    if not isinstance(value.get(name), str):
        raise CallError(f'the call has no string "{name}"')

    given = None
    for key in arguments:
        if key in value:
            given = value[key]
            break
    if not isinstance(given, dict):
        raise CallError(f'the call has no object "{arguments[0]}"')

    written = value.get(call_id) if call_id else None
    return ToolCall(value[name], given, written if isinstance(written, str) else "")


def read_object(text: str, start: int) -> tuple[dict[str, Any], int]:
    """Read the JSON object that begins at `text[start]`; return it and the position after it.

    Raises:
        CallError: there is no valid JSON object.
    """
    value, end = read_json(text, start)
    if not isinstance(value, dict):
        raise CallError("the arguments are not a JSON object")
    return value, end


def read_calls(text: str, start: int, parsed: ParsedTurn, call_of: Callable[[Any], ToolCall]) -> tuple[int, str | None]:
    """Read a JSON array of calls one by one; a malformed or cut one does not lose the others.

    Args:
        text: the turn.
        start: where the array begins.
        parsed: receives the calls.
        call_of: makes a call of a value; if it raises CallError, the call is malformed.

    Returns:
        The position after the array and None; or the position of a fault and the reason.
    """
    position = skip_space(text, start)
    if not text.startswith("[", position):
        return position, "the calls are not a JSON array"

    position = skip_space(text, position + 1)
    while not text.startswith("]", position):
        try:
            value, end = read_json(text, position)
        except CallError as exc:
            return position, why(exc, text)
        try:
            parsed.tool_calls.append(call_of(value))
        except CallError as exc:
            parsed.malformed_calls.append(MalformedCall(text[position:end], str(exc)))

        position = skip_space(text, end)
        if text.startswith(",", position):
            position = skip_space(text, position + 1)
        elif not text.startswith("]", position):
            cut = position == len(text)
            return position, f"{'cut off: ' * cut}calls are separated by commas, and ] ends their array"
    return position + 1, None


def why(fault: CallError, text: str) -> str:
    """Return the reason for the model; a turn that ends within the JSON was cut off."""
    cause = fault.__cause__
    if isinstance(cause, json.JSONDecodeError):
        at_end = cause.pos >= len(text.rstrip()) or cause.msg.startswith("Unterminated string")
        return "cut off before the JSON ends" if at_end else str(fault)
    return str(fault)
