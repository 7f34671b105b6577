"""`{"name": .., "parameters": {..}}` as the whole turn: Llama 3.1 and later."""

from __future__ import annotations

import re

from agentloop.chat.call_json import CallError, read_json
from agentloop.chat.formats.base import BaseFormat, Tools, json_call, why
from agentloop.chat.sampled import SampledText
from agentloop.types import MalformedCall, ParsedTurn

TAG = "<|python_tag|>"
_NAMED = re.compile(r"\{[^{}]*\"name\"\s*:")


class Llama3JsonFormat(BaseFormat):
    """JSON objects with a name at the beginning of a turn, or behind `<|python_tag|>`, with `;` or nothing between.

    JSON that names no tool is an answer in JSON, and so is text.
    """

    name = "llama3_json"

    def read(self, turn: SampledText, parsed: ParsedTurn, tools: Tools) -> str:
        tag = turn.find(TAG)
        before = turn.text[:tag] if tag >= 0 else ""
        text = turn.text
        position = start = turn.skip_space(tag + len(TAG) if tag >= 0 else 0)
        try:
            while text.startswith("{", position):
                value, end = read_json(text, position)
                if not isinstance(value, dict) or "name" not in value:
                    break
                try:
                    parsed.tool_calls.append(json_call(value, arguments=("parameters", "arguments")))
                except CallError as exc:
                    parsed.malformed_calls.append(MalformedCall(text[position:end], str(exc)))
                position = turn.skip_space(end)
                while turn.text.startswith((";", TAG), position):
                    position = turn.skip_space(position + (1 if text[position] == ";" else len(TAG)))
        except CallError as exc:
            if tag >= 0 or _NAMED.match(text, position):
                parsed.malformed_calls.append(MalformedCall(text[position:].strip(), why(exc, text)))
                position = len(text)
        if tag >= 0 and position == start:
            reason = f'{TAG} has to be followed by a call as JSON: {{"name": .., "parameters": {{..}}}}'
            parsed.malformed_calls.append(MalformedCall(text[start:].strip(), reason))
            position = len(text)
        return before + text[position:]
