"""`<|START_ACTION|>[{"tool_call_id": .., "tool_name": .., "parameters": {..}}]<|END_ACTION|>`:
Cohere's Command models.

The first models write the same array after `Action: `, in a fence of three backticks.
"""

from __future__ import annotations

import re

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import TaggedFormat, Tools, json_call, read_calls
from agentloop.chat.sampled import SampledText
from agentloop.types import MalformedCall, ParsedTurn, ToolCall

_FENCED = re.compile(r"^Action:\s*```(?:json)?\s*(?=\[)", re.MULTILINE)
NO_CALL = ("directly-answer", "directly_answer")
"""The first Command models call one of these to say that they call no tool."""


class CohereFormat(TaggedFormat):
    """Calls as an array between tags; the tags around the answer are dropped."""

    name = "cohere"
    reasoning_tags = ("<|START_THINKING|>", "<|END_THINKING|>")
    opening, closing = "<|START_ACTION|>", "<|END_ACTION|>"
    dropped = ("<|START_RESPONSE|>", "<|END_RESPONSE|>")

    def read(self, turn: SampledText, parsed: ParsedTurn, tools: Tools) -> str:
        fenced = _FENCED.search(turn.text)
        if fenced is None or 0 <= turn.find(self.opening) < fenced.start():
            return super().read(turn, parsed, tools)

        end, fault = read_calls(turn.text, fenced.end(), parsed, _call)
        parsed.tool_calls[:] = [call for call in parsed.tool_calls if call.name not in NO_CALL]
        if fault:
            parsed.malformed_calls.append(MalformedCall(turn.text[end:].strip(), fault))
            return turn.text[: fenced.start()]
        return turn.text[: fenced.start()] + turn.text[end:].lstrip().removeprefix("```")

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        end, fault = read_calls(turn.text, start, parsed, _call)
        if fault is None:
            try:
                return self.end_call(turn, end)
            except CallError as exc:
                fault = str(exc)
        return self.refuse(turn, end, end, fault, parsed)


def _call(value: object) -> ToolCall:
    return json_call(value, name="tool_name", arguments=("parameters",), call_id="tool_call_id")
