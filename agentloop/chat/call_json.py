"""JSON that a model wrote: read strictly, and never more than the rest of the system can carry.

What a call holds goes on to tools, into the next prompt and into the trace. Values that one of them cannot take are
faults of the call, told to the model, not of the run.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

DEEPEST = 64
"""Levels of nesting that are read."""

_SPACE = re.compile(r"\s*")


class CallError(ValueError):
    """Why a piece of JSON cannot be used; the text is for the model to read."""


def read_json(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `text[start]`, white space skipped, and where the text goes on after it.

    Raises:
        CallError: not JSON, or a value that is no finite number, no 64-bit integer, no text, or nested too deeply.
    """
    space = _SPACE.match(text, start)
    assert space is not None  # it matches the empty text too
    try:
        value, end = _DECODER.raw_decode(text, space.end())
    except json.JSONDecodeError as exc:
        raise CallError(f"not valid JSON ({exc.msg})") from exc
    except RecursionError as exc:
        raise CallError(f"nested in more than {DEEPEST} levels") from exc
    body = text[space.end() : end]
    if body.count("{") + body.count("[") > DEEPEST and _depth(value) > DEEPEST:
        raise CallError(f"nested in more than {DEEPEST} levels")
    if "\\u" in body:
        _refuse_lone_surrogates(value)
    return value, end


def _integer(digits: str) -> int:
    # The length first: turning thousands of digits into a number is slow, and refused by Python in the end.
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise CallError("an integer of more than 64 bits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise CallError("a number that is too large")
    return value


def _constant(name: str) -> NoReturn:
    raise CallError(f"not valid JSON ({name} is no number)")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_float, parse_constant=_constant)


def _depth(value: Any) -> int:
    """Levels of nesting, without recursion of our own."""
    depth, level = 0, [value]
    while level:
        inner = [item for item in level if isinstance(item, (dict, list))]
        depth += bool(inner)
        level = [child for item in inner for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def _refuse_lone_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        raise CallError("half of a surrogate pair, which is no character") from exc
