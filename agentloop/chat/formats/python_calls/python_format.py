"""`PythonFormat`: calls in Python syntax between tags, as a list or one after the other."""

from __future__ import annotations

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import TaggedFormat, Tools, report
from agentloop.chat.formats.literals import begins_call, read_python_call
from agentloop.chat.formats.values import cut_by_control, skip_value
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn, ToolCall


class PythonFormat(TaggedFormat):
    """Calls with literals as keyword arguments, `[f(a="x"), g()]`, between two tags."""

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        end, fault = read_python_calls(turn, start, parsed)
        if fault is None:
            try:
                return self.end_call(turn, end)
            except CallError as exc:
                fault = exc
        return self.refuse(turn, end, end, fault, parsed)


def read_python_calls(turn: SampledText, start: int, parsed: ParsedTurn) -> tuple[int, CallError | None]:
    """Read a list of calls, or calls one after the other; a malformed one does not lose those
    before it.

    Args:
        turn: the sampled turn.
        start: where the first call or the list begins.
        parsed: receives the calls.

    Returns:
        The position after the calls and None; or the position of a fault and the error.
    """
    position = turn.skip_space(start)
    text, offset = turn.stretch(position)
    in_list = text.startswith("[", position - offset)
    if in_list:
        position = turn.skip_space(position + 1)

    first = True
    while not (in_list and text.startswith("]", position - offset)):
        if not first and not in_list and not begins_call(text, position - offset):
            return position, None
        begin = position
        call: ToolCall | None = None
        try:
            call, end = read_python_call(text, position - offset)
        except CallError as exc:
            bracket = text.find("(", position - offset) + offset
            end = skip_value(turn, max(bracket, position), exc) - offset
            if not begins_call(text, position - offset) or end <= bracket - offset:
                return position, cut_by_control(turn, position, exc)
            end = report(turn, (position, end + offset), exc, parsed) - offset

        first = False
        position = turn.skip_space(end + offset)
        is_separated = not in_list or text.startswith((",", "]"), position - offset)
        is_cut = position - offset >= len(text)
        if call is not None and (is_separated or is_cut):
            parsed.tool_calls.append(call)
        if text.startswith(",", position - offset):
            position = turn.skip_space(position + 1)
        elif not is_separated:
            reason = f"{'cut off: ' * is_cut}calls are separated by commas, and ] ends their list"
            # What follows shows that the call is wrong, for instance a quote within a string.
            return begin if call is not None and not is_cut else position, CallError(reason, is_cut=is_cut)
    return position + 1, None
