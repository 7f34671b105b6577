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

_NAME = re.compile(r"[^\s<>{}\"]+")


class Glm45Format(TaggedFormat):
    """Calls whose arguments are text between tags, typed by the tool's schema.

    Attributes:
        key_tags, value_tags: the tags around the name of an argument, and around its value.
        separator: the tag after the name of the tool; empty: there is none.
    """

    name = "glm45"
    opening, closing = "<tool_call>", "</tool_call>"
    key_tags: tuple[str, str] = ("<arg_key>", "</arg_key>")
    value_tags: tuple[str, str] = ("<arg_value>", "</arg_value>")
    separator: str = ""

    @property
    def tags(self) -> tuple[str, ...]:
        return (*super().tags, *self.key_tags, *self.value_tags, *filter(None, (self.separator,)))

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        call = ToolCall("", {})
        end = start
        try:
            found = turn.find_first(self.tags, start)
            if found is None:
                raise CallError(f"cut off before {self.closing}")
            call.name = turn.text[start : found[0]].strip()
            ends = (self.key_tags[0], self.separator, self.closing, self.opening)
            is_word = _NAME.fullmatch(call.name) and turn.next_control(start)[0] >= found[0]
            if found[1] not in ends or not is_word:
                raise CallError(f"{self.opening} must be followed by the tool's name alone, then {self.key_tags[0]}")

            schemas = schemas_of(tools, call.name)
            end = found[0]
            if found[1] == self.separator:
                end = turn.skip_space(end + len(self.separator))
            while turn.at(self.key_tags[0], end):
                key, value_at = self._key(turn, end)
                if key in call.arguments:
                    raise CallError(f"the argument {key!r} is given twice")
                try:
                    value, end = read_typed(
                        turn,
                        value_at,
                        self.value_tags[1],
                        (self.key_tags[0], self.closing),
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

    def _key(self, turn: SampledText, start: int) -> tuple[str, int]:
        """Return the key at `start`, and where its value begins."""
        opening, closing = self.key_tags
        start += len(opening)
        close, tag = turn.find_first(self.tags, start) or (len(turn), "")
        if tag != closing or turn.next_control(start)[0] < close:
            raise CallError(f"{opening} without {closing}")
        place = turn.skip_space(close + len(closing))
        if not turn.at(self.value_tags[0], place):
            raise CallError(f"{closing} must be followed by {self.value_tags[0]}")
        return turn.text[start:close], place + len(self.value_tags[0])
