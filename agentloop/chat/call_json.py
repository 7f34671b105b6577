"""Read JSON that a model wrote: strictly, and only values that the rest of the system can handle.

The values of a call go to tools, into the next prompt and into the trace. A value that one of them
cannot handle makes the call malformed: the model is shown the reason, and the run continues.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

DEEPEST = 64
"""Maximum levels of nesting."""

_SPACE = re.compile(r"\s*")


class CallError(ValueError):
    """A call cannot be read. The text is shown to the model."""


def read_json(text: str, start: int) -> tuple[Any, int]:
    """Read the JSON value that begins at `text[start]`, after white space; return it and its end.

    Raises:
        CallError: it is not JSON, it contains a number that is infinite or an integer of more than
            64 bits, a string with half of a surrogate pair, or it is nested too deeply.
    """
    space = _SPACE.match(text, start)
    assert space is not None  # it also matches the empty string
    try:
        value, end = _DECODER.raw_decode(text, space.end())
    except json.JSONDecodeError as exc:
        raise CallError(f"not valid JSON ({exc.msg})") from exc
    except RecursionError as exc:
        raise CallError(f"nested in more than {DEEPEST} levels") from exc

    # The checks below walk the value only if its text can contain what they look for.
    body = text[space.end() : end]
    if body.count("{") + body.count("[") > DEEPEST and _depth(value) > DEEPEST:
        raise CallError(f"nested in more than {DEEPEST} levels")
    if "\\u" in body:
        _refuse_lone_surrogates(value)
    return value, end


def _integer(digits: str) -> int:
    # Check the length first: converting thousands of digits is slow, and Python may refuse it.
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise CallError("an integer of more than 64 bits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise CallError("a number that is too large")
    return value


def _constant(name: str) -> NoReturn:
    raise CallError(f"not valid JSON ({name} is not a number)")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_float, parse_constant=_constant)


def _depth(value: Any) -> int:
    """Count the levels of nesting, without recursion."""
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
        raise CallError("half of a surrogate pair, which is not a character") from exc
