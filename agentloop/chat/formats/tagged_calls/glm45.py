"""`<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>`: GLM from 4.5.

A newline separates the parts.
"""

from __future__ import annotations

import re

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import TaggedFormat, Tools
from agentloop.chat.formats.typed import read_typed, schemas_of
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn, ToolCall

KEY, END_KEY = "<arg_key>", "</arg_key>"
VALUE, END_VALUE = "<arg_value>", "</arg_value>"
_NAME = re.compile(r"[^\s<>{}\"]+")


class Glm45Format(TaggedFormat):
    """Calls whose arguments are text between tags, typed by the tool's schema."""

    name = "glm45"
    opening, closing = "<tool_call>", "</tool_call>"
    inner = (KEY, END_KEY, VALUE, END_VALUE)

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        call = ToolCall("", {})
        end = start
        try:
            found = turn.find_first(self.tags, start)
            if found is None:
                raise CallError(f"cut off before {self.closing}")
            call.name = turn.text[start : found[0]].strip()
            if found[1] not in (KEY, self.closing, self.opening) or not _NAME.fullmatch(call.name):
                raise CallError(f"{self.opening} must be followed by the tool's name alone, then {KEY}")

            schemas = schemas_of(tools, call.name)
            end = found[0]
            while turn.at(KEY, end):
                key, value_at = _key(turn, end)
                if key in call.arguments:
                    raise CallError(f"the argument {key!r} is given twice")
                try:
                    value, end = read_typed(
                        turn,
                        value_at,
                        END_VALUE,
                        (KEY, self.closing),
                        schemas.get(key),
                        tags=self.tags,
                        own_lines=False,
                    )
                except CallError as exc:
                    raise CallError(f"argument {key!r}: {exc}") from exc
                call.arguments[key] = value
                end = turn.skip_space(end)
            if end == len(turn):
                raise CallError(f"cut off before {self.closing}")  # arguments may be missing
            on = self.end_call(turn, end)
        except CallError as exc:
            return self.refuse(turn, start, end, exc, parsed)
        parsed.tool_calls.append(call)
        return on


def _key(turn: SampledText, start: int) -> tuple[str, int]:
    """Return the key at `start`, and where its value begins."""
    close, tag = turn.find_first((END_KEY, *Glm45Format().tags), start + len(KEY)) or (len(turn), "")
    if tag != END_KEY or turn.next_control(start + len(KEY))[0] < close:
        raise CallError(f"{KEY} without {END_KEY}")
    place = turn.skip_space(close + len(END_KEY))
    if not turn.at(VALUE, place):
        raise CallError(f"{END_KEY} must be followed by {VALUE}")
    return turn.text[start + len(KEY) : close], place + len(VALUE)
