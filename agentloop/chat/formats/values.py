"""Values as models write them: what is read although it is not quite JSON, decided once.

A value is read if it can be meant in one way only. So all formats accept JSON, line breaks in its
strings, and Python's literals; `07` could be a number or text, and is refused. docs/tool_formats.md
lists the forms.
"""

from __future__ import annotations

from typing import Any

from agentloop.chat.call_json import CUT_JSON, CallError, read_json
from agentloop.chat.formats.literals import read_literal
from agentloop.chat.sampled import SampledText


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
            return value, end + offset
        if fault.is_cut and offset + len(text) < len(turn):
            control = turn.next_control(offset + len(text))[1] if isinstance(turn, SampledText) else ""
            raise CallError(f"{CUT_JSON}: {control} follows", is_cut=True, in_string=fault.in_string) from fault
        raise
    return value, end + offset
