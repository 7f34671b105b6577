"""Qwen3-Coder and Qwen3.5: calls whose arguments are text between tags.

<tool_call>
<function=NAME>
<parameter=KEY>
VALUE
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

from typing import ClassVar

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import TaggedFormat, Tools
from agentloop.chat.formats.typed import read_typed, schemas_of
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn, ToolCall

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"


class Qwen3CoderFormat(TaggedFormat):
    """Calls whose arguments are text between tags, typed by the tool's schema.

    Attributes:
        own_lines: a value is on its own lines, without the newlines around it.
    """

    name = "qwen3_coder"
    opening, closing = "<tool_call>", "</tool_call>"
    inner = (FUNCTION, END_FUNCTION, PARAMETER, END_PARAMETER)
    own_lines: ClassVar[bool] = True

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        call = ToolCall("", {})
        end = start
        try:
            call.name, end = _named(turn, FUNCTION, turn.skip_space(start))
            schemas = schemas_of(tools, call.name)
            while turn.at(PARAMETER, end := turn.skip_space(end)):
                key, value_at = _named(turn, PARAMETER, end)
                if key in call.arguments:
                    raise CallError(f"the argument {key!r} is given twice")
                try:
                    value, end = read_typed(
                        turn,
                        value_at,
                        END_PARAMETER,
                        (PARAMETER, END_FUNCTION),
                        schemas.get(key),
                        tags=self.tags,
                        own_lines=self.own_lines,
                    )
                except CallError as exc:
                    raise CallError(f"argument {key!r}: {exc}") from exc
                call.arguments[key] = value

            if turn.at(END_FUNCTION, end):
                end += len(END_FUNCTION)
            elif not turn.at(self.closing, end):
                cut = "cut off: " * (end == len(turn))
                raise CallError(f"{cut}{PARAMETER}KEY> or {END_FUNCTION} must follow each argument")
            on = self.end_call(turn, end)
        except CallError as exc:
            return self.refuse(turn, start, end, exc, parsed)
        parsed.tool_calls.append(call)
        return on


def _named(turn: SampledText, tag: str, start: int) -> tuple[str, int]:
    """Return the name in `<tag=NAME>`, and the position after the tag."""
    if not turn.at(tag, start):
        raise CallError(f"the call does not begin with {tag}NAME>")

    end = turn.text.find(">", start)
    name = turn.text[start + len(tag) : end] if 0 <= end < turn.next_control(start)[0] else ""
    if not name.strip() or "\n" in name or "<" in name:
        raise CallError(f"{tag} is not followed by a name and >")
    return name, end + 1
