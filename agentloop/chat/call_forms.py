"""`CallForms`: the form in which a template takes the calls of a message.

Most templates take a call's arguments as an object. Some write them into the text as they are, so
they must be JSON text (DeepSeek, Apertus); with an object these fail, or write it in Python syntax.
Kimi's write the id of a call in place of its name, so the id must contain the name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_NAME, _ID, _KEY, _VALUE = "probe_form", "probe0000", "argument", "probe-value"
_PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": "Begin."},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": _ID, "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}},
        ],
    },
]

PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "A probe."}}},
    },
}
"""The schema of the probe's tool."""


@dataclass(frozen=True, slots=True)
class CallForms:
    """The form of calls in messages for a template.

    Attributes:
        arguments_as_text: the arguments are JSON text, not an object.
        names_in_ids: the template writes ids in place of names: they are `functions.NAME:INDEX`.
    """

    arguments_as_text: bool = False
    names_in_ids: bool = False

    def shown(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages with their calls in this form; the given ones are not changed."""
        if not self.arguments_as_text and not self.names_in_ids:
            return messages

        result: list[dict[str, Any]] = []
        ids: dict[Any, str] = {}
        count = 0
        for message in messages:
            calls = message.get("tool_calls")
            if isinstance(calls, list) and calls:
                shown = []
                for call in calls:
                    made = self._with_text(call) if self.arguments_as_text else call
                    if self.names_in_ids:
                        made = _with_name(made, count)
                        ids[call.get("id")] = made["id"]
                    shown.append(made)
                    count += 1
                message = {**message, "tool_calls": shown}
            elif message.get("tool_call_id") in ids:
                message = {**message, "tool_call_id": ids[message["tool_call_id"]]}
            result.append(message)
        return result

    @staticmethod
    def _with_text(call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function") or {}
        if not isinstance(function.get("arguments"), dict):
            return call
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def find_call_forms(render: Callable[[Sequence[dict[str, Any]]], str | None]) -> CallForms:
    """Return the form in which a template takes calls.

    Args:
        render: renders messages; None if the template refuses them.
    """
    forms = CallForms()
    text = render(_PROBE)
    if text is None or str({_KEY: _VALUE}) in text:
        as_text = CallForms(arguments_as_text=True)
        rendered = render(as_text.shown(_PROBE))
        if rendered is not None and json.dumps({_KEY: _VALUE}) in rendered:
            forms, text = as_text, rendered
    if text is not None and _ID in text and _VALUE in text and _NAME not in text:
        return CallForms(forms.arguments_as_text, names_in_ids=True)
    return forms


def _with_name(call: dict[str, Any], index: int) -> dict[str, Any]:
    """Return a call whose id contains its name; an id that contains it already is kept.

    The number at the end of an id is kept too, so that the new one does not depend on the calls
    before it; an id without one gets the index of the call.
    """
    name, given = (call.get("function") or {}).get("name", ""), str(call.get("id") or "")
    if re.fullmatch(rf"(?:functions\.)?{re.escape(str(name))}:\d+", given):
        return call
    number = re.search(r"\d{1,9}$", given)
    return {**call, "id": f"functions.{name}:{int(number[0]) if number else index}"}
