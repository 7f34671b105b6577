"""A tool-call format of one's own: `[[name {"key": "value"}]]`."""

from __future__ import annotations

from agentloop.chat.call_json import CallError
from agentloop.chat.formats import TaggedFormat
from agentloop.chat.formats.base import Tools, read_object
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn, ToolCall


class BracketFormat(TaggedFormat):
    """Name and JSON arguments between double brackets."""

    name = "brackets"
    opening, closing = "[[", "]]"

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        begin = turn.text.find("{", start)
        end = begin if begin >= 0 else start
        try:
            if begin < 0:
                raise CallError("the call has no JSON object of arguments")
            arguments, end = read_object(turn.text, begin)
            behind = self.end_call(turn, end)
        except CallError as exc:
            return self.refuse(turn, start, end, str(exc), parsed)
        parsed.tool_calls.append(ToolCall(turn.text[start:begin].strip(), arguments))
        return behind
