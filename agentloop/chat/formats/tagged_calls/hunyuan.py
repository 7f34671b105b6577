"""`<tool_calls>[{"name": .., "arguments": {..}}, ..]</tool_calls>`: Tencent's Hunyuan-A13B, and

<tool_calls>
<tool_call>NAME<tool_sep>
<arg_key>KEY</arg_key>
<arg_value>VALUE</arg_value>
</tool_call>
</tool_calls>

Hy3 and Hy4, which omits `<tool_sep>`. The tags of some checkpoints end in a suffix, as in
`<tool_calls:opensource>`.
"""

from __future__ import annotations

import re
from functools import cache

from agentloop.chat.call_json import CallError
from agentloop.chat.formats.base import BaseFormat, Tools, report
from agentloop.chat.formats.json_calls.json_format import JsonFormat
from agentloop.chat.formats.tagged_calls.glm45 import Glm45Format
from agentloop.chat.formats.values import read_value, skip_value
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn

ANSWER = "助手："
"""The first Hunyuan models begin an answer with it: `Assistant:`."""

_SUFFIX = re.compile(r"</?(?:tool_calls?|think)(?P<suffix>:[\w-]+)>")


class _Objects(JsonFormat):
    """Calls as a JSON array; the objects may also stand side by side."""

    name = "hunyuan_a13b"
    opening, closing = "<tool_calls>", "</tool_calls>"

    def read_call(self, turn: SampledText, start: int, parsed: ParsedTurn, tools: Tools) -> int:
        end = turn.skip_space(start)
        if not turn.text.startswith("{", end):
            return super().read_call(turn, start, parsed, tools)

        while turn.text.startswith("{", end):
            behind = end
            try:
                value, behind = read_value(turn, end)
                parsed.tool_calls.append(self.call_of(value))
            except CallError as exc:
                behind = skip_value(turn, end, exc) if behind == end else behind
                if behind == end:
                    return self.refuse(turn, end, end, exc, parsed)
                behind = report(turn, (end, behind), exc, parsed)
            end = turn.skip_space(behind)
        try:
            return self.end_call(turn, end)
        except CallError as exc:
            return self.refuse(turn, end, end, exc, parsed)


class _Tagged(Glm45Format):
    """Calls as GLM writes them, enclosed in one more pair of tags."""

    name = "hunyuan_hy3"

    def __init__(self, suffix: str) -> None:
        def tag(name: str) -> str:
            return f"<{name}{suffix}>"

        self.reasoning_tags = (tag("think"), tag("/think"))
        self.opening, self.closing = tag("tool_call"), tag("/tool_call")
        self.dropped = (tag("tool_calls"), tag("/tool_calls"))
        self.separator = tag("tool_sep")
        self.key_tags, self.value_tags = (tag("arg_key"), tag("/arg_key")), (tag("arg_value"), tag("/arg_value"))


class HunyuanFormat(BaseFormat):
    """Calls as a JSON array or as text between tags: what follows the first tag decides."""

    name = "hunyuan"

    @property
    def reasoning_openings(self) -> tuple[str, ...]:
        return "<think>", "<think:opensource>"

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*_Objects().tags, *_tagged("").tags)))

    def parse(self, turn: SampledText, tools: Tools | None = None, *, reasoning_open: bool = False) -> ParsedTurn:
        found = _SUFFIX.search(turn.text)
        if found and turn.at(found[0], found.start()):
            return _tagged(found["suffix"]).parse(turn, tools, reasoning_open=reasoning_open)
        return super().parse(turn, tools, reasoning_open=reasoning_open)

    def read(self, turn: SampledText, parsed: ParsedTurn, tools: Tools) -> str:
        found = turn.find_first((_Objects.opening, Glm45Format.opening))
        body = turn.skip_space(found[0] + len(found[1])) if found else 0
        is_tagged = turn.at(Glm45Format.opening, body)
        if found is not None and found[1] == Glm45Format.opening:
            # Without the tag before all calls, only a control token announces one.
            is_tagged = turn.knows(Glm45Format.opening)
        text = (_tagged("") if is_tagged else _Objects()).read(turn, parsed, tools)
        return text.lstrip().removeprefix(ANSWER)


@cache
def _tagged(suffix: str) -> _Tagged:
    return _Tagged(suffix)
