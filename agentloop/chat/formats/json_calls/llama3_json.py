"""`{"name": .., "parameters": {..}}` as the whole turn: Llama 3.1 and later."""

from __future__ import annotations

import re

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import BaseFormat, Tools, json_call, offered, report, resume
from agentloop.chat.formats.values import read_value, skip_value
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn

TAG = "<|python_tag|>"
ARGUMENTS = ("parameters", "arguments")
_NAMED = re.compile(r"\{[^{}]*[\"']name[\"']\s*:")


class Llama3JsonFormat(BaseFormat):
    """JSON objects with a name, at the beginning of a turn or after `<|python_tag|>`, separated by
    `;` or nothing.

    JSON that names no tool is an answer, and so is text.
    """

    name = "llama3_json"
    inner = (TAG,)

    def read(self, turn: SampledText, parsed: ParsedTurn, tools: Tools) -> str:
        kept: list[str] = []
        names = offered(tools)
        position = self._read_calls(turn, turn.skip_space(0), parsed, None, names)
        if position == turn.skip_space(0):
            position = 0
        while (tag := turn.find(TAG, position)) >= 0:
            kept.append(turn.text[position:tag])
            start = turn.skip_space(tag + len(TAG))
            if turn.at(TAG, start):
                position = start  # a tag that is repeated announces the call once
                continue
            position = self._read_calls(turn, start, parsed, TAG, names)
            if position == start:
                reason = f'{TAG} must be followed by a call as JSON: {{"name": .., "parameters": {{..}}}}'
                position = self._refuse(turn, start, reason, parsed)
        return "".join([*kept, turn.text[position:]])

    def _read_calls(
        self, turn: SampledText, start: int, parsed: ParsedTurn, tag: str | None, names: frozenset[str]
    ) -> int:
        """Read the calls from `start` on; return the position after them, `start` if there are
        none.

        Args:
            turn: the sampled turn.
            start: where the first call begins.
            parsed: receives the calls.
            tag: the tag before them, which promises calls: JSON that cannot be read is a malformed
                call. None: JSON may be an answer.
            names: the names of the offered tools.
        """
        text, position = turn.text, start
        while text.startswith("{", position):
            try:
                value, end = read_value(turn, position)
            except CallError as exc:
                if tag is None and not _NAMED.match(text, position):
                    return position
                end = skip_value(turn, position, exc)
                if end == position:
                    return self._refuse(turn, position, exc, parsed)
                position = self._next(turn, report(turn, (position, end), exc, parsed))
                continue

            if not isinstance(value, dict) or "name" not in value:
                return position
            if tag is None and value["name"] not in names and not any(key in value for key in ARGUMENTS):
                return position  # an object with a name: an answer
            try:
                parsed.tool_calls.append(json_call(value, arguments=ARGUMENTS))
            except CallError as exc:
                end = report(turn, (position, end), exc, parsed)

            position = self._next(turn, end)
        return position

    def _next(self, turn: SampledText, end: int) -> int:
        """Return the position after the semicolon that may follow a call."""
        position = turn.skip_space(end)
        while turn.text.startswith(";", position):
            position = turn.skip_space(position + 1)
        return position

    def _refuse(self, turn: SampledText, start: int, reason: str | CallError, parsed: ParsedTurn) -> int:
        """Record a malformed call, which extends to the next tag; return the position after it."""
        following = turn.find(TAG, resume(turn, start, reason))
        stop = following if following >= 0 else len(turn)
        return report(turn, (start, stop), reason, parsed)
