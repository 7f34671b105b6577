"""`<longcat_tool_call>{"name": .., "arguments": {..}}</longcat_tool_call>`: LongCat-Flash, and
`<longcat_tool_call>NAME<longcat_arg_key>KEY</longcat_arg_key>
<longcat_arg_value>VALUE</longcat_arg_value></longcat_tool_call>`: later LongCat models.
"""

from __future__ import annotations

from agentloop.chat.formats.base import Tools
from agentloop.chat.formats.json_calls.json_format import JsonFormat
from agentloop.chat.formats.tagged_calls.glm45 import Glm45Format
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn


class _Object(JsonFormat):
    name = "longcat_json"
    opening, closing = "<longcat_tool_call>", "</longcat_tool_call>"


class LongCatFormat(Glm45Format):
    """Calls as a JSON object, or as a name and text between tags."""

    name = "longcat"
    reasoning_tags = ("<longcat_think>", "</longcat_think>")
    opening, closing = _Object.opening, _Object.closing
    key_tags = ("<longcat_arg_key>", "</longcat_arg_key>")
    value_tags = ("<longcat_arg_value>", "</longcat_arg_value>")

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        if turn.text.startswith(("{", "["), turn.skip_space(start)):
            return _Object().read_call(turn, start, parsed, tools)
        return super().read_call(turn, start, parsed, tools)
