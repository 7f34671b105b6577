"""Values as models write them: what is read although it is not quite JSON, decided once.

A value is read if it can be meant in one way only. So all formats accept JSON, line breaks in its
strings, and Python's literals; `07` could be a number or text, and is refused. docs/tool_formats.md
lists the forms.
"""

from __future__ import annotations

import re
from typing import Any

from agentloop.chat.call_json import DEEPEST, CallError, read_json
from agentloop.chat.formats.literals import read_literal
from agentloop.chat.sampled import SampledText

_STRUCTURE = re.compile(r"""[\[\](){}]|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'""", re.DOTALL)
_TRIPLE = re.compile("\"\"\"|'''")
MOST_OPEN = 2 * DEEPEST
"""Maximum brackets that are open in a value that is skipped."""

MOST_SCANNED = 8
"""How often the text of a turn may be scanned for the ends of values, in lengths of the turn."""

_PAIRS = {"{": "}", "[": "]", "(": ")"}


def read_value(turn: SampledText | str, start: int) -> tuple[Any, int]:
    """Read the value that begins at `start`, after white space; return it and its end.

    A value ends before the next control token at the latest.

    Raises:
        CallError: it is neither JSON nor a Python literal, or a value that a tool cannot be given.
    """
    text, offset = turn.stretch(start) if isinstance(turn, SampledText) else (turn, 0)
    try:
        value, end = read_json(text, start - offset, raw_newlines=True)
    except CallError as fault:
        if fault.is_syntax:
            try:
                value, end = read_literal(text, start - offset)
            except CallError:
                raise fault from None
            if _TRIPLE.search(text, start - offset, end):
                raise fault from None  # rather a quote too many than a string over several lines
            return value, end + offset
        raise (cut_by_control(turn, start, fault) if isinstance(turn, SampledText) else fault) from None
    return value, end + offset


def cut_by_control(turn: SampledText, start: int, fault: CallError) -> CallError:
    """Return the fault of a value at `start`; one that is cut by a control token names it."""
    control = turn.next_control(start)[1]
    if not fault.is_cut or not control:
        return fault
    return CallError(f"{fault}: {control} follows", is_cut=True, in_string=fault.in_string)


def skip_value(turn: SampledText, start: int, fault: CallError) -> int:
    """Return the position after the value at `start` that cannot be read, judged by its brackets
    and strings; `start` if they do not balance, if the fault is that the value is cut, or if the
    turn was scanned `MOST_SCANNED` times.

    So a call that is wrong inside does not lose the calls after it.
    """
    if fault.is_cut or turn.text[start : start + 1] not in _PAIRS or turn.scanned > MOST_SCANNED * len(turn):
        return start
    text, offset = turn.stretch(start)
    end, balances = _balanced(text, start - offset)
    turn.scanned += end + offset - start
    return end + offset if balances else start


def _balanced(text: str, start: int) -> tuple[int, bool]:
    """Return where the bracket at `start` is closed and True; or where the scan ended and False."""
    open_brackets: list[str] = []
    for part in _STRUCTURE.finditer(text, start):
        sign = part[0]
        if sign in _PAIRS:
            open_brackets.append(_PAIRS[sign])
            if len(open_brackets) > MOST_OPEN:  # bounds the time for a turn that opens without end
                return part.end(), False
        elif len(sign) == 1 and (not open_brackets or open_brackets.pop() != sign):
            return part.end(), False
        if not open_brackets:
            return part.end(), True
    return len(text), False
