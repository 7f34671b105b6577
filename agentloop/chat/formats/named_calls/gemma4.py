"""`<|tool_call>call:NAME{KEY:<|"|>text<|"|>,KEY:3}<tool_call|>`: Gemma 4.

Values are strings between two quote tokens, numbers, `true`, `false`, `null`, arrays, and objects
whose keys stand without quotes. FunctionGemma writes the same with other tags.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from agentloop.chat.call_json import DEEPEST, CallError
from agentloop.chat.formats.base import TaggedFormat, Tools, missing
from agentloop.chat.formats.values import read_value
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn, ToolCall

CALL = "call:"
THOUGHT = "thought"
"""The name of the channel that holds the reasoning."""

_NAME = re.compile(r"[^\s{}\[\],:<>\"'`]+")
_KEY = re.compile(r"[^{}\[\],:\"\n]+")


class Gemma4Format(TaggedFormat):
    """Calls as a name and an object, in a notation of their own: strings stand between tokens.

    Attributes:
        quote: the token before and after a string.
    """

    name = "gemma4"
    reasoning_tags = ("<|channel>", "<channel|>")
    opening, closing = "<|tool_call>", "<tool_call|>"
    dropped = ("<|tool_response>",)
    quote: ClassVar[str] = '<|"|>'

    @property
    def tags(self) -> tuple[str, ...]:
        return (*super().tags, self.quote)

    def _split(self, turn: SampledText, is_open: bool) -> tuple[str, SampledText | None]:
        reasoning, said = super()._split(turn, is_open)
        return reasoning.removeprefix(THOUGHT).strip() if reasoning else reasoning, said

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        end = turn.skip_space(start)
        try:
            named = _NAME.match(turn.text, end + len(CALL)) if turn.text.startswith(CALL, end) else None
            if named is None or not turn.text.startswith("{", turn.skip_space(named.end())):
                raise missing(turn, named.end() if named else end, f"a call is written as {CALL}NAME{{key:value,..}}")

            end = turn.skip_space(named.end())
            arguments, end = self._object(turn, end, DEEPEST - 1)
            on = self.end_call(turn, end)
        except CallError as exc:
            return self.refuse(turn, start, end, exc, parsed)
        parsed.tool_calls.append(ToolCall(named[0], arguments))
        return on

    def _value(self, turn: SampledText, start: int, levels: int) -> tuple[Any, int]:
        """Read the value at `start`; return it and the position after it.

        Args:
            turn: the sampled turn.
            start: where the value begins.
            levels: levels of nesting that are left.
        """
        if turn.at(self.quote, start):
            return self._string(turn, start)
        if turn.text[start : start + 1] in ("{", "["):
            if not levels:
                raise CallError(f"nested in more than {DEEPEST} levels")
            read = self._object if turn.text[start] == "{" else self._array
            return read(turn, start, levels - 1)
        try:
            return read_value(turn, start)
        except CallError as exc:
            if not exc.is_syntax:
                raise
            shown = turn.text[start : start + 20]
            raise CallError(
                f"{shown!r} is not a number, true, false, null, or a string between {self.quote} and {self.quote}"
            ) from exc

    def _string(self, turn: SampledText, start: int) -> tuple[str, int]:
        body = start + len(self.quote)
        end = turn.find(self.quote, body)
        control, spelled = turn.next_control(body)
        if end < 0 or control < end:
            follows = f": {spelled} follows" if spelled else ""
            raise CallError(f"cut off before the string ends{follows}", is_cut=True, in_string=True)
        return turn.text[body:end], end + len(self.quote)

    def _array(self, turn: SampledText, start: int, levels: int) -> tuple[list[Any], int]:
        items: list[Any] = []
        end = turn.skip_space(start + 1)
        while not turn.text.startswith("]", end):
            item, end = self._value(turn, end, levels)
            items.append(item)
            end = _next(turn, end, "]")
        return items, end + 1

    def _object(self, turn: SampledText, start: int, levels: int) -> tuple[dict[str, Any], int]:
        items: dict[str, Any] = {}
        end = turn.skip_space(start + 1)
        while not turn.text.startswith("}", end):
            key, end = self._key(turn, end)
            if key in items:
                raise CallError(f"{key[:40]!r} is given twice")
            items[key], end = self._value(turn, turn.skip_space(end), levels)
            end = _next(turn, end, "}")
        return items, end + 1

    def _key(self, turn: SampledText, start: int) -> tuple[str, int]:
        """Return the key at `start` and the position after its colon."""
        if turn.at(self.quote, start):
            key, end = self._string(turn, start)
        elif turn.text.startswith('"', start):
            key, end = read_value(turn, start)
        else:
            found = _KEY.match(turn.text, start, turn.next_control(start)[0])
            key, end = (found[0].strip(), found.end()) if found else ("", start)
        end = turn.skip_space(end)
        if not turn.text.startswith(":", end):
            raise missing(turn, end, "a key must be followed by a colon and its value")
        return key, end + 1


class FunctionGemmaFormat(Gemma4Format):
    """The same notation with the tags of FunctionGemma."""

    name = "functiongemma"
    reasoning_tags = ("<think>", "</think>")
    opening, closing = "<start_function_call>", "<end_function_call>"
    dropped = ("<start_function_response>",)
    quote = "<escape>"


def _next(turn: SampledText, position: int, close: str) -> int:
    """Return the position after the comma that follows an item, or of the closing bracket."""
    position = turn.skip_space(position)
    if turn.text.startswith(",", position):
        return turn.skip_space(position + 1)
    if not turn.text.startswith(close, position):
        raise missing(turn, position, f"each value must be followed by a comma or {close}")
    return position
