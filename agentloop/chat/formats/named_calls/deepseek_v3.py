"""The call format of DeepSeek V3 and R1; V3.1 writes the call on one line.

    V3   <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\\n```json\\n{..}\\n```<｜tool▁call▁end｜>
    V3.1 <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{..}<｜tool▁call▁end｜>

Both put a turn's calls between `<｜tool▁calls▁begin｜>` and `<｜tool▁calls▁end｜>`.
"""

from __future__ import annotations

from typing import Any

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import TaggedFormat, Tools, read_object, tool_name
from agentloop.chat.formats.values import skip_value
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn, ToolCall

SEPARATOR, FENCE = "<｜tool▁sep｜>", "```"
BEGINNINGS = ("", "{", "[", '"', "'")
"""What arguments begin with, unlike a name; nothing: there are none."""


class DeepSeekV3Format(TaggedFormat):
    """Calls with the name before or after a separator; the JSON arguments may be fenced."""

    name = "deepseek_v3"
    opening, closing = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    inner = (SEPARATOR,)
    dropped = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        end = start
        try:
            found = turn.find_first(self.tags, start)
            if found is None or found[1] != SEPARATOR:
                raise CallError(f"no {SEPARATOR} between the name and the arguments")

            name = tool_name(turn, start, found[0])
            end = body = found[0] + len(SEPARATOR)
            text, offset = turn.stretch(body)
            if text[body - offset :].lstrip()[:1] not in BEGINNINGS:
                # V3 and R1: the name follows the separator, and the arguments are fenced.
                fence = text.find(FENCE, body - offset) + offset
                if fence < body:
                    raise CallError(f"{SEPARATOR} must be followed by the name and the arguments as fenced JSON")
                name = tool_name(turn, body, fence)
                body = fence + len(FENCE)
                body += len("json") * turn.text.startswith("json", body)

            end = body
            arguments, end = self._arguments(turn, body)
            place = turn.skip_space(end)
            if turn.text.startswith(FENCE, place):
                end = place + len(FENCE)
            on = self.end_call(turn, end)
        except CallError as exc:
            return self.refuse(turn, start, skip_value(turn, turn.skip_space(end), exc), exc, parsed)
        parsed.tool_calls.append(ToolCall(name, arguments))
        return on

    def _arguments(self, turn: SampledText, start: int) -> tuple[dict[str, Any], int]:
        """Read the arguments; nothing before the closing tag or fence means that there are none."""
        place = turn.skip_space(start)
        if turn.at(self.closing, place) or turn.text.startswith(FENCE, place):
            return {}, place
        return read_object(turn, start)
