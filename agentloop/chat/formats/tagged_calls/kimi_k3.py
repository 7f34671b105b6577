"""Kimi K3: calls and arguments as elements, whose tags are a name between two tokens.

<|open|>tools<|sep|>
<|open|>call tool="NAME" index="1"<|sep|>
<|open|>argument key="KEY" type="string"<|sep|>VALUE<|close|>argument<|sep|>
<|close|>call<|sep|>
<|close|>tools<|sep|>

without the line breaks. The attribute `type` says whether a value is text or JSON; the arguments of
a call may also be one element `json`. The answer is an element `response`.
"""

from __future__ import annotations

import re
from typing import Any

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import TaggedFormat, Tools, missing, read_object, tool_word
from agentloop.chat.formats.typed import read_typed, schemas_of
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn, ToolCall

SEP = "<|sep|>"
ARGUMENT, END_ARGUMENT = "<|open|>argument", f"<|close|>argument{SEP}"
OBJECT, END_OBJECT = "<|open|>json", f"<|close|>json{SEP}"
_ATTRIBUTE = re.compile(r'\s+(\w+)="([^"]*)"')


class KimiK3Format(TaggedFormat):
    """Calls whose arguments are text between tags, typed by an attribute of the tag."""

    name = "kimi_k3"
    reasoning_tags = (f"<|open|>think{SEP}", f"<|close|>think{SEP}")
    opening, closing = "<|open|>call", f"<|close|>call{SEP}"
    inner = (ARGUMENT, END_ARGUMENT, OBJECT, END_OBJECT)
    dropped = tuple(f"<|{edge}|>{name}{SEP}" for name in ("response", "tools", "message") for edge in ("open", "close"))

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        end = start
        try:
            attributes, end = _attributes(turn, start, self.opening)
            call = ToolCall(tool_word(attributes.get("tool", "")), {})
            schemas = schemas_of(tools, call.name)
            end = turn.skip_space(end)
            if turn.at(OBJECT, end):
                _, end = _attributes(turn, end + len(OBJECT), OBJECT)
                call.arguments, end = read_object(turn, end)
                if not turn.at(END_OBJECT, place := turn.skip_space(end)):
                    raise missing(turn, place, f"{END_OBJECT} must follow the object")
                end = turn.skip_space(place + len(END_OBJECT))

            while turn.at(ARGUMENT, end):
                attributes, value_at = _attributes(turn, end + len(ARGUMENT), ARGUMENT)
                key = attributes.get("key", "")
                if not key or key in call.arguments:
                    raise CallError(f"the argument {key!r} is given twice" if key else "an argument has no key")
                schema = _schema(attributes.get("type"), schemas.get(key))
                try:
                    call.arguments[key], end = read_typed(
                        turn,
                        value_at,
                        END_ARGUMENT,
                        (ARGUMENT, self.closing),
                        schema,
                        tags=self.tags,
                        own_lines=False,
                    )
                except CallError as exc:
                    raise CallError(f"argument {key!r}: {exc}") from exc
                end = turn.skip_space(end)
            if end == len(turn):
                raise CallError(f"cut off before {self.closing}")  # arguments may be missing
            on = self.end_call(turn, end)
        except CallError as exc:
            return self.refuse(turn, start, end, exc, parsed)
        parsed.tool_calls.append(call)
        return on


def _attributes(turn: SampledText, start: int, tag: str) -> tuple[dict[str, str], int]:
    """Return the attributes of a tag that begin at `start`, and the position after the tag.

    Raises:
        CallError: something else stands there.
    """
    found: dict[str, str] = {}
    end = start
    stop = turn.next_control(start)[0]
    while attribute := _ATTRIBUTE.match(turn.text, end, stop):
        found[attribute[1]] = attribute[2].replace("&quot;", '"').replace("&amp;", "&")
        end = attribute.end()
    if not turn.at(SEP, end):
        place = end if stop < len(turn) else stop
        raise missing(turn, place, f'{tag} must be followed by attributes such as key="..", and {SEP}')
    return found, end + len(SEP)


def _schema(written: str | None, offered: Any) -> Any:
    """Return the schema of a value: the type that the model wrote; without it, the tool's own."""
    if written is None:
        return offered
    # JSON's integers are numbers to the template.
    return {"type": ["integer", "number"] if written == "number" else written}
