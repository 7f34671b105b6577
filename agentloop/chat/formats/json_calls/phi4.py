"""`<|tool_call|>[{"name": .., "arguments": {..}}]<|/tool_call|>`: Phi-4-mini.

With the prompt that vLLM's template writes, the same model answers
`functools[{"name": .., "arguments": {..}}]`, without a closing tag.
"""

from __future__ import annotations

from typing import ClassVar

from agentloop.chat.formats.base import TaggedFormat, Tools
from agentloop.chat.formats.json_calls.json_format import JsonFormat
from agentloop.chat.formats.variants import VariantsFormat
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn


class _Tagged(JsonFormat):
    name = "phi4_tagged"
    opening, closing = "<|tool_call|>", "<|/tool_call|>"
    arguments_keys = ("arguments", "parameters")


class _Functools(JsonFormat):
    # The bracket belongs to the tag: a text may mention Python's functools.
    name = "phi4_functools"
    opening, closing = "functools[", ""
    arguments_keys = ("arguments", "parameters")

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        return super().read_call(turn, start - 1, parsed, tools)


class Phi4Format(VariantsFormat):
    """Calls as a JSON array, between tags or after the word `functools`."""

    name = "phi4"
    variants: ClassVar[tuple[TaggedFormat, ...]] = (_Tagged(), _Functools())
