"""`<tool_call>\\n{"name": .., "arguments": {..}}\\n</tool_call>`: Hermes, Qwen 2.5 and Qwen 3."""

from __future__ import annotations

from agentloop.chat.call_json import CallError, read_json
from agentloop.chat.formats.base import TaggedFormat, Tools, json_call
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn


class HermesFormat(TaggedFormat):
    """Any number of calls as JSON objects between tags; the text around them is kept."""

    name = "hermes"
    opening, closing = "<tool_call>", "</tool_call>"

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        end = start
        try:
            # The JSON determines where the call ends: a string in it may contain the closing tag.
            value, end = read_json(turn.text, start)
            on = self.end_call(turn, end)
            parsed.tool_calls.append(json_call(value))
        except CallError as exc:
            return self.refuse(turn, start, end, str(exc), parsed)
        return on
