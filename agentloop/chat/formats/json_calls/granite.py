"""`<|tool_call|>[{"name": .., "arguments": {..}}, ..]`: IBM's Granite 3.

Granite 3.1 and 4 write `<tool_call>` instead, Granite 4 with the closing tag and one object in each
pair, as Hermes does. Granite-20b-functioncalling writes `<function_call> {..}` for each call.
"""

from __future__ import annotations

from typing import ClassVar

from agentloop.chat.formats.base import TaggedFormat, Tools
from agentloop.chat.formats.json_calls.json_format import JsonFormat
from agentloop.chat.formats.variants import VariantsFormat
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn

NO_CALL = "no_function"
"""Granite-20b-functioncalling calls it to say that it calls no tool."""


class _Granite3(JsonFormat):
    name = "granite_3"
    opening, closing = "<|tool_call|>", ""
    arguments_keys = ("arguments", "parameters")


class _Granite4(JsonFormat):
    name = "granite_4"
    opening, closing = "<tool_call>", "</tool_call>"
    arguments_keys = ("arguments", "parameters")


class _Granite20b(JsonFormat):
    name = "granite_20b"
    opening, closing = "<function_call>", ""

    def read(self, turn: SampledText, parsed: ParsedTurn, tools: Tools) -> str:
        text = super().read(turn, parsed, tools)
        parsed.tool_calls[:] = [call for call in parsed.tool_calls if call.name != NO_CALL]
        return text


class GraniteFormat(VariantsFormat):
    """Calls as an array or an object after a tag; the end of the JSON ends them."""

    name = "granite"
    variants: ClassVar[tuple[TaggedFormat, ...]] = (_Granite3(), _Granite4(), _Granite20b())
