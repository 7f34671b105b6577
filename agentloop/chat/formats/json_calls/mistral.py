"""`[TOOL_CALLS] [{"name": .., "arguments": {..}, "id": ..}]`, and `[TOOL_CALLS]NAME[ARGS]{..}`:
Mistral's models.

The second form, of the newer tokenizers, is repeated for each call and may contain the id:
`NAME[CALL_ID]ID[ARGS]{..}`.
"""

from __future__ import annotations

import re

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import BaseFormat, Tools, json_call, read_calls, read_object, report, resume, tool_name
from agentloop.chat.formats.values import read_value
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn, ToolCall

_ID = re.compile(r"[\w.:-]*")
CALLS, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class MistralFormat(BaseFormat):
    """Calls after a tag without a closing tag: the end of the JSON ends them."""

    name = "mistral"
    inner = (CALLS, ARGUMENTS, CALL_ID)
    reasoning_tags = ("[THINK]", "[/THINK]")

    def read(self, turn: SampledText, parsed: ParsedTurn, tools: Tools) -> str:
        kept: list[str] = []
        position = 0
        while (start := turn.find(CALLS, position)) >= 0:
            kept.append(turn.text[position:start])
            # A tag that is repeated before the call announces it once.
            while turn.at(CALLS, start):
                start = body = turn.skip_space(start + len(CALLS))

            fault: CallError | None = None
            if turn.text.startswith("[", body) and not turn.at(ARGUMENTS, body) and not turn.at(CALL_ID, body):
                position, fault = read_calls(turn, body, parsed, _call)
            else:
                try:
                    call, position = self._read_call(turn, body)
                    parsed.tool_calls.append(call)
                except CallError as exc:
                    position, fault = body, exc

            if fault is not None:
                following = turn.find(CALLS, resume(turn, position, fault))
                stop = following if following >= 0 else len(turn)
                position = report(turn, (position, stop), fault, parsed)

        kept.append(turn.text[position:])
        return "".join(kept)

    def _read_call(self, turn: SampledText, start: int) -> tuple[ToolCall, int]:
        """Read the single call that follows a tag; return it and the position after it."""
        if turn.text.startswith("{", start):
            value, end = read_value(turn, start)
            return _call(value), end

        text, offset = turn.stretch(start)
        brace = text.find("{", start - offset) + offset
        found = turn.find_first((ARGUMENTS, CALLS, CALL_ID), start) or (len(turn), "")
        call_id = ""
        name_end = found[0]
        if found[1] == CALL_ID:
            id_start = name_end + len(CALL_ID)
            found = turn.find_first((ARGUMENTS, CALLS, CALL_ID), id_start) or (len(turn), "")
            call_id = turn.text[id_start : found[0]].strip()
            if turn.next_control(id_start)[0] < found[0] or not _ID.fullmatch(call_id):
                raise CallError(f"{CALL_ID} must be followed by the id of the call, a word, and {ARGUMENTS}")
        if found[1] == ARGUMENTS:
            body = found[0] + len(ARGUMENTS)
        elif start < brace < found[0]:
            name_end = body = brace  # the tag is missing, and only the arguments can begin here
        else:
            raise CallError(f"no {ARGUMENTS} between the name and the arguments")

        name = tool_name(turn, start, name_end)
        if turn.at(CALLS, turn.skip_space(body)):
            return ToolCall(name, {}, call_id), body
        arguments, end = read_object(turn, body)
        return ToolCall(name, arguments, call_id), end


def _call(value: object) -> ToolCall:
    return json_call(value, call_id="id")
