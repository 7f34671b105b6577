"""`JsonFormat`: calls as JSON objects between tags; most formats of this family only name them."""

from __future__ import annotations

from typing import Any, ClassVar

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import TaggedFormat, Tools, json_call, read_calls
from agentloop.chat.formats.values import read_value, skip_value
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn, ToolCall


class JsonFormat(TaggedFormat):
    """One call as a JSON object, or several as an array of objects, between two tags.

    Attributes:
        name_key: the key of the tool's name.
        arguments_keys: the keys that may hold the arguments.
        id_key: the key of the call's id; None: calls have none.
    """

    name_key: ClassVar[str] = "name"
    arguments_keys: ClassVar[tuple[str, ...]] = ("arguments",)
    id_key: ClassVar[str | None] = None

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        body = end = turn.skip_space(start)
        if turn.text.startswith("[", body):
            end, fault = read_calls(turn, body, parsed, self.call_of)
            if fault is not None:
                return self.refuse(turn, end, end, fault, parsed)
            try:
                return self.end_call(turn, end)
            except CallError as exc:
                return self.refuse(turn, end, end, exc, parsed)

        try:
            # The JSON determines where the call ends: a string in it may spell the closing tag.
            value, end = read_value(turn, body)
            on = self.end_call(turn, end)
            parsed.tool_calls.append(self.call_of(value))
        except CallError as exc:
            return self.refuse(turn, start, end if end > body else skip_value(turn, body, exc), exc, parsed)
        return on

    def call_of(self, value: Any) -> ToolCall:
        """Return the call that one JSON object describes.

        Raises:
            CallError: it does not describe a call.
        """
        return json_call(value, name=self.name_key, arguments=self.arguments_keys, call_id=self.id_key)
