"""`[f(a="x", n=1), g()]` as the whole turn: Llama 3.2 and 4, and others.

Llama 4 may put the list between `<|python_start|>` and `<|python_end|>`. OLMo 3 writes the calls on
lines of their own, between `<function_calls>` and `</function_calls>`.
"""

from __future__ import annotations

import re

from agentloop.chat.formats.base import BaseFormat, Tools, offered, report
from agentloop.chat.formats.literals import NAME
from agentloop.chat.formats.python_calls.python_format import PythonFormat, read_python_calls
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn

_LIST = re.compile(rf"\[\s*({NAME})\s*\(\s*(\)|{NAME}\s*=)?")


class _Llama4(PythonFormat):
    name = "pythonic"
    opening, closing = "<|python_start|>", "<|python_end|>"


class _Olmo3(PythonFormat):
    name = "pythonic"
    opening, closing = "<function_calls>", "</function_calls>"


_FRAMES = (_Llama4(), _Olmo3())


class PythonicFormat(BaseFormat):
    """Python calls between the tags of Llama 4 or OLMo 3, or as a list that begins the turn.

    A list without tags that does not look like calls with keyword arguments is text, unless it
    begins with the name of an offered tool.
    """

    name = "pythonic"
    inner = tuple(tag for frame in _FRAMES for tag in frame.tags)

    def read(self, turn: SampledText, parsed: ParsedTurn, tools: Tools) -> str:
        frames = [(place, i) for i, frame in enumerate(_FRAMES) if (place := turn.find(frame.opening)) >= 0]
        start = turn.skip_space(0)
        text, offset = turn.stretch(start)
        listed = _LIST.match(text, start - offset)
        if frames and not listed:
            return _FRAMES[min(frames)[1]].read(turn, parsed, tools)
        if not listed or not (listed[2] or listed[1] in offered(tools)):
            return turn.text

        end, fault = read_python_calls(turn, start, parsed)
        if fault is not None:
            report(turn, (end, len(turn)), fault, parsed)
            return ""
        return turn.text[end:]
