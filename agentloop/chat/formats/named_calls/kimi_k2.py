"""`<|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>{..}<|tool_call_end|>`:
Kimi K2.

What stands before the arguments is the id of the call, which contains the name. A turn's calls are
enclosed in `<|tool_calls_section_begin|>` and `<|tool_calls_section_end|>`.
"""

from __future__ import annotations

import re

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import TaggedFormat, Tools, missing, read_object
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn, ToolCall

ARGUMENTS = "<|tool_call_argument_begin|>"
_ID = re.compile(r"(?:functions\.)?(?P<name>[^\s:<>|]+):\d+")


class KimiK2Format(TaggedFormat):
    """Calls as an id that contains the name, a tag, and the arguments as JSON."""

    name = "kimi_k2"
    opening, closing = "<|tool_call_begin|>", "<|tool_call_end|>"
    inner = (ARGUMENTS,)
    dropped = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        end = start
        try:
            found = turn.find_first((ARGUMENTS, self.closing, self.opening), start)
            if found is None or found[1] != ARGUMENTS:
                end = found[0] if found else len(turn)
                raise missing(turn, end, f"{ARGUMENTS} must stand between the id and the arguments")

            call_id = turn.text[start : found[0]].strip()
            end = found[0] + len(ARGUMENTS)
            named = _ID.fullmatch(call_id)
            if named is None:
                raise CallError("the id of a call is written as functions.NAME:INDEX")

            arguments, end = read_object(turn, end)
            on = self.end_call(turn, end)
        except CallError as exc:
            return self.refuse(turn, start, end, exc, parsed)
        parsed.tool_calls.append(ToolCall(named["name"], arguments, call_id))
        return on
