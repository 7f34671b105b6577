"""`<|action_start|><|plugin|>\\n{"name": .., "parameters": {..}}<|action_end|>`: InternLM 2 and
Intern-S1, which puts a space between the two tags.

`<|interpreter|>` instead of `<|plugin|>` announces a block of program text.
"""

from __future__ import annotations

import re

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import Tools
from agentloop.chat.formats.json_calls.json_format import JsonFormat
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn, ToolCall

PLUGIN, INTERPRETER = "<|plugin|>", "<|interpreter|>"
CODE = "interpreter"
"""The name of the call that program text makes; its one argument is `code`."""

_FENCED = re.compile(r"\s*```[\w+-]*\n(.*?)\n?```\s*", re.DOTALL)


class InternLMFormat(JsonFormat):
    """One call as a JSON object, or program text, between tags."""

    name = "internlm"
    opening, closing = "<|action_start|>", "<|action_end|>"
    inner = (PLUGIN, INTERPRETER)
    arguments_keys = ("parameters", "arguments")

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        place = turn.skip_space(start)
        if turn.at(PLUGIN, place):
            return super().read_call(turn, place + len(PLUGIN), parsed, tools)
        if not turn.at(INTERPRETER, place):
            return self.refuse(turn, start, start, f"{self.opening} must be followed by {PLUGIN}", parsed)

        body = place + len(INTERPRETER)
        end = turn.find_first((self.closing, self.opening), body)
        stop = end[0] if end else len(turn)
        fenced = _FENCED.fullmatch(turn.text, body, stop)
        code = fenced[1] if fenced else turn.text[body:stop].strip()
        control, spelling = turn.next_control(body)
        try:
            if control < stop:
                raise CallError(f"{spelling} must not stand within program text")
            if not code or (not fenced and code.startswith("```")):
                raise CallError(f"{INTERPRETER} must be followed by program text, in a closed fence or without one")
            on = self.end_call(turn, stop)
        except CallError as exc:
            return self.refuse(turn, body, stop, exc, parsed)
        parsed.tool_calls.append(ToolCall(CODE, {"code": code}))
        return on
