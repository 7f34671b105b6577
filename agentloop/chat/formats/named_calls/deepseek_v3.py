"""The call format of DeepSeek V3 and R1; V3.1 writes the call on one line.

    V3   <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\\n```json\\n{..}\\n```<｜tool▁call▁end｜>
    V3.1 <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{..}<｜tool▁call▁end｜>

Both put a turn's calls between `<｜tool▁calls▁begin｜>` and `<｜tool▁calls▁end｜>`.
"""

from __future__ import annotations

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import TaggedFormat, Tools, read_object
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn, ToolCall

SEPARATOR, FENCE = "<｜tool▁sep｜>", "```"


class DeepSeekV3Format(TaggedFormat):
    """Calls with the name before or after a separator; the JSON arguments may be fenced."""

    name = "deepseek_v3"
    opening, closing = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    inner = (SEPARATOR,)
    dropped = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        end = start
        try:
            found = turn.find_first((SEPARATOR, self.closing), start)
            if found is None or found[1] != SEPARATOR:
                raise CallError(f"no {SEPARATOR} between the name and the arguments")

            name = turn.text[start : found[0]].strip()
            end = body = found[0] + len(SEPARATOR)
            if not turn.text.startswith("{", turn.skip_space(body)):
                # V3 and R1: the name follows the separator, and the arguments are fenced.
                fence = turn.text.find(FENCE, body)
                name = turn.text[body:fence].strip() if fence >= 0 else "\n"
                if "\n" in name:
                    raise CallError(f"{SEPARATOR} must be followed by the name and the arguments as fenced JSON")
                body = fence + len(FENCE)
                body += len("json") * turn.text.startswith("json", body)
            if not name:
                raise CallError("the call names no tool")

            arguments, end = read_object(turn, body)
            place = turn.skip_space(end)
            if turn.text.startswith(FENCE, place):
                end = place + len(FENCE)
            on = self.end_call(turn, end)
        except CallError as exc:
            return self.refuse(turn, start, end, exc, parsed)
        parsed.tool_calls.append(ToolCall(name, arguments))
        return on
