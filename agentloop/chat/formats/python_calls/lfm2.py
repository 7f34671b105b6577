"""`<|tool_call_start|>[f(a="x", n=1), g()]<|tool_call_end|>`: LFM2, and other models that write
calls in Python syntax.
"""

from __future__ import annotations

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import TaggedFormat, Tools
from agentloop.chat.formats.literals import read_python_call
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn


class Lfm2Format(TaggedFormat):
    """Calls as a Python list of calls, with literals as arguments."""

    name = "lfm2"
    opening, closing = "<|tool_call_start|>", "<|tool_call_end|>"

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        end = turn.skip_space(start)
        try:
            if not turn.text.startswith("[", end):
                raise CallError("the calls are not a list: [name(key=value), ..]")

            end = turn.skip_space(end + 1)
            while not turn.text.startswith("]", end):
                call, behind = read_python_call(turn.text, end)
                parsed.tool_calls.append(call)
                end = turn.skip_space(behind)
                if turn.text.startswith(",", end):
                    end = turn.skip_space(end + 1)
                elif not turn.text.startswith("]", end):
                    raise CallError("calls are separated by commas, and ] ends their list")

            end += 1
            return self.end_call(turn, end)
        except CallError as exc:
            return self.refuse(turn, end, end, str(exc), parsed)
