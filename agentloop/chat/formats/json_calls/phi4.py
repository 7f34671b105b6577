"""`<|tool_call|>[{"name": .., "arguments": {..}}]<|/tool_call|>`: Phi-4-mini.

With the prompt that vLLM's template writes, the same model answers
`functools[{"name": .., "arguments": {..}}]`, without a closing tag.
"""

from __future__ import annotations

import re

from agentloop.chat.formats.base import Tools, read_calls, report
from agentloop.chat.formats.json_calls.json_format import JsonFormat
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn

_FUNCTOOLS = re.compile(r"(?<!\S)functools\s*(?=\[\s*(?:\{|\Z))")
"""The word before an array of objects: a text may mention Python's functools."""


class Phi4Format(JsonFormat):
    """Calls as a JSON array, between tags or after the word `functools`."""

    name = "phi4"
    opening, closing = "<|tool_call|>", "<|/tool_call|>"
    arguments_keys = ("arguments", "parameters")

    def read(self, turn: SampledText, parsed: ParsedTurn, tools: Tools) -> str:
        word = _FUNCTOOLS.search(turn.text)
        if word is None or 0 <= turn.find(self.opening) < word.start():
            return super().read(turn, parsed, tools)

        before = turn.text[: word.start()]
        end, fault = read_calls(turn, word.end(), parsed, self.call_of)
        if fault is not None:
            report(turn, (end, len(turn)), fault, parsed)
            return before
        return before + turn.text[end:]
