"""`<|START_ACTION|>[{"tool_call_id": .., "tool_name": .., "parameters": {..}}]<|END_ACTION|>`:
Cohere's Command models.

The first models write the same array after `Action: `, in a fence of three backticks.
"""

from __future__ import annotations

import re

from agentloop.chat.formats.base import Tools, read_calls, report
from agentloop.chat.formats.json_calls.json_format import JsonFormat
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn

_FENCED = re.compile(r"^Action:\s*```(?:json)?\s*(?=\[)", re.MULTILINE)
NO_CALL = ("directly-answer", "directly_answer")
"""The first Command models call one of these to say that they call no tool."""


class CohereFormat(JsonFormat):
    """Calls as an array between tags; the tags around the answer are dropped."""

    name = "cohere"
    reasoning_tags = ("<|START_THINKING|>", "<|END_THINKING|>")
    opening, closing = "<|START_ACTION|>", "<|END_ACTION|>"
    dropped = ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>")
    name_key, arguments_keys, id_key = "tool_name", ("parameters",), "tool_call_id"

    def read(self, turn: SampledText, parsed: ParsedTurn, tools: Tools) -> str:
        fenced = _FENCED.search(turn.text)
        if fenced is None or 0 <= turn.find(self.opening) < fenced.start():
            return super().read(turn, parsed, tools)

        end, fault = read_calls(turn, fenced.end(), parsed, self.call_of)
        parsed.tool_calls[:] = [call for call in parsed.tool_calls if call.name not in NO_CALL]
        if fault is not None:
            report(turn, (end, len(turn)), fault, parsed)
            return turn.text[: fenced.start()]
        return turn.text[: fenced.start()] + turn.text[end:].lstrip().removeprefix("```")
