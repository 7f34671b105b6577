"""`[{"name": .., "arguments": {..}}, ..]` as the whole turn: Salesforce's xLAM 2.

The array may also stand in a fence of three backticks, after `[TOOL_CALLS]`, or between
`<tool_call>` tags. xLAM 1 writes `{"tool_calls": [..]}`.
"""

from __future__ import annotations

import re

from agentloop.chat.formats.base import BaseFormat, Tools, json_call, read_calls, report
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn

FENCE, CALLS, OPENING, CLOSING = "```", "[TOOL_CALLS]", "<tool_call>", "</tool_call>"
_ARRAY = re.compile(r'\s*(?:json\b\s*)?(\{\s*"tool_calls"\s*:\s*)?(?=\[\s*\{[^{}\[\]]*"name"\s*:)')
"""An array of calls: JSON that names no tool is an answer."""


class XlamFormat(BaseFormat):
    """Calls as a JSON array without a tag of its own; JSON that names no tool is an answer."""

    name = "xlam"
    inner = (CALLS, OPENING, CLOSING)

    def read(self, turn: SampledText, parsed: ParsedTurn, tools: Tools) -> str:
        text, kept, position = turn.text, "", 0
        while (start := self._next_array(turn, position)) is not None:
            place, body, wrapped = start
            kept += text[position:place]
            position, fault = read_calls(turn, body, parsed, json_call)
            if fault is not None:
                report(turn, (position, len(turn)), fault, parsed)
                return kept
            position = _after(turn, position, wrapped=wrapped)
        return kept + text[position:]

    def _next_array(self, turn: SampledText, start: int) -> tuple[int, int, bool] | None:
        """Return where the next array is announced, where it begins, and whether it is the value of
        an object; None: no further array.
        """
        if start == 0 and (bare := _ARRAY.match(turn.text)):
            return 0, bare.end(), bare[1] is not None
        while found := turn.find_first((FENCE, CALLS, OPENING), start):
            start = found[0] + len(found[1])
            if array := _ARRAY.match(turn.text, start):
                return found[0], array.end(), array[1] is not None
        return None


def _after(turn: SampledText, position: int, *, wrapped: bool) -> int:
    """Return the position after what closes an array."""
    place = turn.skip_space(position)
    if wrapped and turn.text.startswith("}", place):
        position = place + 1
        place = turn.skip_space(position)
    for closing in (FENCE, CLOSING):
        if turn.at(closing, place):
            return place + len(closing)
    return position
