"""`<|tools_prefix|>[{"NAME": {..}}, ..]<|tools_suffix|>`: Apertus."""

from __future__ import annotations

from typing import Any

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import as_arguments, tool_word
from agentloop.chat.formats.json_calls.json_format import JsonFormat
from agentloop.types import ToolCall


class ApertusFormat(JsonFormat):
    """Calls as an array of objects with one key: the name of the tool."""

    name = "apertus"
    reasoning_tags = ("<|inner_prefix|>", "<|inner_suffix|>")
    opening, closing = "<|tools_prefix|>", "<|tools_suffix|>"

    def call_of(self, value: Any) -> ToolCall:
        if not isinstance(value, dict) or len(value) != 1:
            raise CallError('a call is a JSON object with one key: {"NAME": {..arguments..}}')
        ((name, given),) = value.items()
        return ToolCall(tool_word(name), as_arguments(given, name))
