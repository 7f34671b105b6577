"""`InvokeFormat`: blocks of calls written as `<invoke name="NAME">`, with their arguments as text:
`<parameter name="KEY">VALUE</parameter>`.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import TaggedFormat, Tools, missing, read_object, report, resume
from agentloop.chat.formats.typed import read_typed, schemas_of
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn, ToolCall

_NAMED = re.compile(r'\s+name="(?P<name>[^"\n]+)"(?:\s+string="(?P<string>true|false)")?\s*(?P<empty>/?)>')
_TYPED: dict[str, Any] = {
    "true": {"type": "string"},
    "false": {"type": ["integer", "number", "boolean", "array", "object", "null"]},
}
"""The schemas that the attribute `string` of a parameter stands for."""


class InvokeFormat(TaggedFormat):
    """A block of any number of calls; a malformed call does not lose the others of its block.

    Attributes:
        prefix: what stands before the names of the tags within a block.
        mark: a token within each tag; empty: there is none.
        frames: tags around each call within a block, which say nothing.
    """

    prefix: ClassVar[str] = ""
    mark: ClassVar[str] = ""
    frames: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.call, self.end_of_call = f"<{self.prefix}invoke", f"</{self.prefix}invoke>"
        self.parameter, self.end_parameter = f"<{self.prefix}parameter", f"</{self.prefix}parameter>"
        own = (self.call, self.end_of_call, self.parameter, self.end_parameter, self.mark)
        self.inner = (*filter(None, own), *self.frames)

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        position = self._skip_frames(turn, start)
        if not turn.at(self.call, position):
            fault = missing(turn, position, f"{self.opening} must be followed by {self.call} name=..>")
            return self.refuse(turn, start, position, fault, parsed)

        while turn.at(self.call, position):
            position = self._skip_frames(turn, self._read_invoke(turn, position, parsed, tools))
        try:
            return self.end_call(turn, position)
        except CallError as exc:
            return self.refuse(turn, position, position, exc, parsed)

    def _skip_frames(self, turn: SampledText, position: int) -> int:
        position = turn.skip_space(position)
        while frame := next((tag for tag in self.frames if turn.at(tag, position)), None):
            position = turn.skip_space(position + len(frame))
        return position

    def _read_invoke(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        """Read the call that begins at `start`; return the position after it."""
        end = start
        try:
            tag = _tag(turn, start, self.call)
            end = turn.skip_space(tag.end())
            call = ToolCall(tag["name"], {})
            if turn.text.startswith("{", end):
                call.arguments, end = read_object(turn, end)
                end = turn.skip_space(end)

            schemas = schemas_of(tools, call.name)
            while turn.at(self.parameter, end):
                argument = _tag(turn, end, self.parameter)
                key, schema = argument["name"], _TYPED.get(argument["string"] or "", schemas.get(argument["name"]))
                if key in call.arguments:
                    raise CallError(f"argument {key!r} is given twice")
                try:
                    call.arguments[key], end = read_typed(
                        turn,
                        argument.end(),
                        self.end_parameter,
                        (self.parameter, self.end_of_call),
                        schema,
                        tags=self.tags,
                        own_lines=False,
                    )
                except CallError as exc:
                    raise CallError(f"argument {key!r}: {exc}") from exc
                end = turn.skip_space(end)

            if not tag["empty"]:
                if not turn.at(self.end_of_call, end):
                    raise missing(turn, end, f"{self.end_of_call} must follow the arguments")
                end += len(self.end_of_call)
        except CallError as exc:
            return self._refuse_invoke(turn, start, end, exc, parsed)
        parsed.tool_calls.append(call)
        return end

    def _refuse_invoke(self, turn: SampledText, start: int, end: int, fault: CallError, parsed: ParsedTurn) -> int:
        """Record a malformed call of a block; return the position after it.

        It extends to its closing tag, or to where the next call begins, or to the end of the block.
        """
        ends = (self.end_of_call, self.call, self.closing, self.opening, *self.frames)
        found = turn.find_first(ends, max(resume(turn, end, fault), start + len(self.call)))
        stop, tag = found or (len(turn), "")
        return report(turn, (start, stop), fault, parsed, on=stop + len(tag) * (tag == self.end_of_call))


def _tag(turn: SampledText, start: int, opening: str) -> re.Match[str]:
    """Return the attributes of the tag that begins with `opening` at `start`.

    Raises:
        CallError: it has no name, does not end, or a control token stands within it.
    """
    place, spelling = turn.next_control(start + len(opening))
    tag = _NAMED.match(turn.text, start + len(opening))
    if tag is not None and place < tag.end():
        raise CallError(f"{spelling} must not stand within the tag {opening}")
    if tag is None:
        end = turn.text.find(">", start)
        raise missing(turn, end if end >= 0 else len(turn), f'{opening} must be followed by name="NAME">')
    return tag
