"""`{"name": .., "parameters": {..}}` as the whole turn: Llama 3.1 and later."""

from __future__ import annotations

import re

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import BaseFormat, Tools, json_call
from agentloop.chat.formats.values import read_value
from agentloop.chat.sampled import SampledText
from agentloop.types import MalformedCall, ParsedTurn

TAG = "<|python_tag|>"
_NAMED = re.compile(r"\{[^{}]*\"name\"\s*:")


class Llama3JsonFormat(BaseFormat):
    """JSON objects with a name, at the beginning of a turn or after `<|python_tag|>`, separated by
    `;` or nothing.

    JSON that names no tool is an answer, and so is text.
    """

    name = "llama3_json"
    inner = (TAG,)

    def read(self, turn: SampledText, parsed: ParsedTurn, tools: Tools) -> str:
        start = turn.skip_space(0)
        end = self._read_calls(turn, start, parsed, announced=False)
        if end > start:
            return turn.text[end:]

        tag = turn.find(TAG)
        if tag < 0:
            return turn.text

        start = turn.skip_space(tag + len(TAG))
        end = self._read_calls(turn, start, parsed, announced=True)
        if end == start:
            reason = f'{TAG} must be followed by a call as JSON: {{"name": .., "parameters": {{..}}}}'
            parsed.malformed_calls.append(MalformedCall(turn.text[start:].strip(), reason))
            end = len(turn)
        return turn.text[:tag] + turn.text[end:]

    def _read_calls(self, turn: SampledText, start: int, parsed: ParsedTurn, *, announced: bool) -> int:
        """Read the calls from `start` on; return the position after them, `start` if there are
        none.

        Args:
            announced: a tag promises calls, so JSON that cannot be read is a malformed call.
        """
        text, position = turn.text, start
        while text.startswith("{", position):
            try:
                value, end = read_value(turn, position)
            except CallError as exc:
                if not announced and not _NAMED.match(text, position):
                    return position
                parsed.malformed_calls.append(MalformedCall(text[position:].strip(), str(exc)))
                return len(text)

            if not isinstance(value, dict) or "name" not in value:
                return position
            try:
                parsed.tool_calls.append(json_call(value, arguments=("parameters", "arguments")))
            except CallError as exc:
                parsed.malformed_calls.append(MalformedCall(text[position:end], str(exc)))

            position = turn.skip_space(end)
            while text.startswith(";", position) or turn.at(TAG, position):
                position = turn.skip_space(position + (len(TAG) if turn.at(TAG, position) else 1))
        return position
