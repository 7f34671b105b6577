"""`ToolFormat` and what formats share: reasoning, tags around a call, calls written as JSON.

A format declares its grammar as class attributes: `tags` lists every tag, so that no value contains
one and tests know which tags are control tokens. A format only reads, and reads whole turns: how
calls and results are written is the template's matter, and nothing is parsed while it is sampled.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.values import read_value, skip_value
from agentloop.chat.sampled import SampledText
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
        inner: the tags of the grammar within a call.
    """

    name: str
    reasoning_tags: tuple[str, str] | None = ("<think>", "</think>")
    inner: tuple[str, ...] = ()

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag of the grammar, without those of the reasoning."""
        return self.inner

    @property
    def reasoning_openings(self) -> tuple[str, ...]:
        """The tags that may open the reasoning."""
        return self.reasoning_tags[:1] if self.reasoning_tags else ()

    def parse(self, turn: SampledText, tools: Tools | None = None, *, reasoning_open: bool = False) -> ParsedTurn:
        """Read one turn; an unreadable call is returned as malformed, with the reason."""
        reasoning, said = self._split(turn, reasoning_open)
        parsed = ParsedTurn(text="", reasoning=reasoning or None)
        if said is not None:
            parsed.text = self.read(said, parsed, tools or []).strip()
            return parsed

        # Reasoning that is never closed must not hide a call: one whose tag was sampled is meant.
        found = turn.find_first(tuple(filter(turn.knows, self.tags)))
        if found is not None and self.reasoning_tags is not None:
            reason = f"the call is part of the reasoning: {self.reasoning_tags[1]} must come before it"
            parsed.malformed_calls.append(MalformedCall(turn.text[found[0] :].strip(), reason))
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
        closing: the tag after it; empty: the end of the call's body ends it.
        dropped: tags that are removed from the text around the calls.
    """

    opening: str
    closing: str
    dropped: tuple[str, ...] = ()

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.opening, self.closing, *self.inner, *self.dropped)))

    def read(self, turn: SampledText, parsed: ParsedTurn, tools: Tools) -> str:
        kept: list[str] = []
        position = 0
        while (start := turn.find(self.opening, position)) >= 0:
            kept.append(self._around(turn, position, start))
            # A tag that is repeated before the call announces it once.
            while turn.at(self.opening, start):
                body = start + len(self.opening)
                start = turn.skip_space(body)
            position = self.read_call(turn, body, parsed, tools)
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
        """Return the position after the closing tag that follows a complete body ending at `end`.

        The tag may be missing where the next call begins and where the turn ends: nothing else can
        follow the body, so the reading is unique.

        Raises:
            CallError: something else follows the body.
        """
        place = turn.skip_space(end)
        if self.closing and turn.at(self.closing, place):
            return place + len(self.closing)
        if not self.closing or place == len(turn):
            return end
        if any(turn.at(tag, place) for tag in (self.opening, *self.dropped)):
            return place
        raise CallError(f"text after the call: {self.closing} must follow it")

    def refuse(self, turn: SampledText, start: int, end: int, reason: str | CallError, parsed: ParsedTurn) -> int:
        """Record a malformed call; return the position after it.

        The call extends to the next closing tag, or to where the next call begins.

        Args:
            turn: the sampled turn.
            start: where the body of the call begins.
            end: where it stops being readable.
            reason: shown to the model.
            parsed: receives the malformed call.
        """
        found = turn.find_first(tuple(filter(None, (self.closing, self.opening))), resume(turn, end, reason))
        text = str(reason)
        if found is None:
            stop = on = len(turn)
            if text.startswith("cut off") and self.closing and not turn.next_control(end)[1]:
                text = f"cut off before {self.closing}"
        else:
            stop, tag = found
            on = stop + len(tag) * (tag == self.closing)
        return report(turn, (start, stop), text, parsed, on=on)


MOST_MALFORMED = 64
"""Maximum malformed calls of a turn that are read one by one."""


def report(
    turn: SampledText, span: tuple[int, int], reason: str | CallError, parsed: ParsedTurn, *, on: int | None = None
) -> int:
    """Record a malformed call; return the position at which the reading of the turn goes on.

    After `MOST_MALFORMED` of them the rest of the turn is one malformed call, and the position is
    the end of the turn: a model that repeats the beginning of a call must not cost a search each.

    Args:
        turn: the sampled turn.
        span: where the text of the call begins and ends.
        reason: shown to the model.
        parsed: receives the malformed call.
        on: the position after the call; None: where its text ends.
    """
    start, stop = span
    count = len(parsed.malformed_calls)
    if count < MOST_MALFORMED:
        parsed.malformed_calls.append(MalformedCall(turn.text[start:stop].strip(), str(reason)))
        return stop if on is None else on
    if count == MOST_MALFORMED:
        text = f"{reason}; after {MOST_MALFORMED} malformed calls the rest of the turn is not read"
        parsed.malformed_calls.append(MalformedCall(turn.text[start:].strip(), text))
    return len(turn)


def missing(turn: SampledText, position: int, reason: str) -> CallError:
    """Return the error for what must follow `position`: a turn that ends there was cut off."""
    cut = turn.skip_space(position) == len(turn)
    return CallError(f"{'cut off: ' * cut}{reason}", is_cut=cut)


def resume(turn: SampledText, position: int, reason: str | CallError) -> int:
    """Return where the search for the next tag goes on after a fault at `position`.

    If the text ends within a value, all of it up to the next control token belongs to the value,
    and contains no tag.
    """
    return turn.next_control(position)[0] if isinstance(reason, CallError) and reason.is_cut else position


def offered(tools: Tools) -> frozenset[str]:
    """Return the names of the offered tools."""
    return frozenset(str((tool.get("function") or {}).get("name")) for tool in tools)


_WORD = re.compile(r"[^\s{}\"'`<>\[\](),;]+")


def tool_name(turn: SampledText, start: int, end: int) -> str:
    """Return the name of a tool that stands alone between two positions.

    Raises:
        CallError: it is missing, not one word, or a control token stands within it.
    """
    place, spelling = turn.next_control(start)
    if place < end:
        raise CallError(f"{spelling} must not stand within the name of a tool")
    return tool_word(turn.text[start:end].strip())


def tool_word(name: str) -> str:
    """Return the name of a tool if it is one word.

    Raises:
        CallError: it is not, or it is empty.
    """
    if not _WORD.fullmatch(name):
        raise CallError(f"{name[:40]!r} is not the name of a tool" if name else "the call names no tool")
    return name


MOST_ENCODINGS = 2
"""Levels of JSON text around the arguments that are read."""


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
    tool_word(value[name])

    given = next((value[key] for key in arguments if key in value), None)
    written = value.get(call_id) if call_id else None
    return ToolCall(value[name], as_arguments(given, arguments[0]), written if isinstance(written, str) else "")


def as_arguments(given: Any, called: str = "arguments") -> dict[str, Any]:
    """Return the arguments of a call: none if it has none, and those in JSON text as an object.

    Some models write such text as a JSON string once more. Two levels are read.

    Args:
        given: what the model wrote; None if it wrote nothing.
        called: the name of the arguments in the call, for the error message.

    Raises:
        CallError: they are not an object.
    """
    if given is None or (isinstance(given, str) and not given.strip()):
        return {}
    for _ in range(MOST_ENCODINGS):
        if not isinstance(given, str):
            break
        try:
            value, end = read_value(given, 0)
        except CallError as exc:
            raise CallError(f'the call has no object "{called}", but text: {exc}') from exc
        given = value if not given[end:].strip() else None
    if not isinstance(given, dict):
        raise CallError(f'the call has no object "{called}"')
    return given


def read_object(turn: SampledText | str, start: int) -> tuple[dict[str, Any], int]:
    """Read the arguments that begin at `start` as a JSON object, or as one in JSON text; return
    them and the position after them.

    Raises:
        CallError: there is no valid JSON object.
    """
    value, end = read_value(turn, start)
    if not isinstance(value, (dict, str)):
        raise CallError("the arguments are not a JSON object")
    return as_arguments(value), end


def read_calls(
    turn: SampledText, start: int, parsed: ParsedTurn, call_of: Callable[[Any], ToolCall]
) -> tuple[int, CallError | None]:
    """Read a JSON array of calls one by one; a malformed or cut one does not lose the others.

    Args:
        turn: the sampled turn.
        start: where the array begins.
        parsed: receives the calls.
        call_of: makes a call of a value; if it raises CallError, the call is malformed.

    Returns:
        The position after the array and None; or the position of a fault and the error.
    """
    text = turn.text
    position = turn.skip_space(start)
    if not text.startswith("[", position):
        return position, CallError("the calls are not a JSON array")

    position = turn.skip_space(position + 1)
    while not text.startswith("]", position):
        begin = end = position
        call: ToolCall | None = None
        try:
            value, end = read_value(turn, position)
            call = call_of(value)
        except CallError as exc:
            end = skip_value(turn, position, exc) if end == position else end
            if end == position:
                return position, exc
            end = report(turn, (position, end), exc, parsed)

        position = turn.skip_space(end)
        is_separated = text.startswith((",", "]"), position)
        is_next = text.startswith("{", position)  # a comma is missing
        is_cut = position == turn.next_control(position)[0]  # at the end of the turn, or a control token
        if call is not None and (is_separated or is_next or is_cut):
            parsed.tool_calls.append(call)
        if text.startswith(",", position):
            position = turn.skip_space(position + 1)
        elif not is_separated:
            reason = f"{'cut off: ' * is_cut}calls are separated by commas, and ] ends their array"
            # What follows shows that the call is wrong, for instance a quote within a string.
            is_wrong = call is not None and not (is_next or is_cut)
            return begin if is_wrong else position, CallError(reason, is_cut=is_cut)
    return position + 1, None
