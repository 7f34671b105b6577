"""`<tool_call>\\n{"name": .., "arguments": {..}}\\n</tool_call>`: Hermes, Qwen 2.5 and Qwen 3."""

from __future__ import annotations

from agentloop.chat.formats.json_calls.json_format import JsonFormat


class HermesFormat(JsonFormat):
    """Any number of calls as JSON objects between tags; the text around them is kept."""

    name = "hermes"
    opening, closing = "<tool_call>", "</tool_call>"
