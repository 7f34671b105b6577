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

CUT_JSON = "cut off before the JSON ends"
LEADING_ZERO = 'a number must not begin with 0: write 7, or "07" for text'

_SPACE = re.compile(r"\s*")
_NO_VALUE = re.compile(r"(?![\[{\"0-9-])(?!(?:true|false|null|NaN|Infinity))\w*\W")
"""Text that is neither a value nor the beginning of one. The decoder would find it too, but its
error counts the lines of the whole turn."""


class CallError(ValueError):
    """A call cannot be read. The text is shown to the model.

    Attributes:
        is_syntax: the text is not a value of the language at all, rather than a value that is
            refused.
        is_cut: the text ends within the value.
        in_string: the text ends within a string of the value, so all of it belongs to the string.
    """

    def __init__(self, reason: str, *, is_syntax: bool = False, is_cut: bool = False, in_string: bool = False) -> None:
        super().__init__(reason)
        self.is_syntax = is_syntax
        self.is_cut = is_cut
        self.in_string = in_string


def read_json(text: str, start: int, *, raw_newlines: bool = False) -> tuple[Any, int]:
    """Read the JSON value that begins at `text[start]`, after white space; return it and its end.

    Args:
        text, start: what to read, and from where.
        raw_newlines: strings may contain line breaks and tabs that are not escaped.

    Raises:
        CallError: it is not JSON, it contains a number that is infinite or an integer of more than
            64 bits, a key twice, a string with half of a surrogate pair, or it is nested too
            deeply.
    """
    space = _SPACE.match(text, start)
    assert space is not None  # it also matches the empty string
    begin = space.end()
    if _NO_VALUE.match(text, begin):
        raise CallError("not valid JSON (Expecting value)", is_syntax=True)
    try:
        value, end = (_TOLERANT if raw_newlines else _STRICT).raw_decode(text, begin)
    except json.JSONDecodeError as exc:
        raise _not_json(exc, text) from exc
    except RecursionError as exc:
        raise CallError(f"nested in more than {DEEPEST} levels") from exc
    if text[begin:end] in ("0", "-0") and text[end : end + 1].isdecimal():
        raise CallError(LEADING_ZERO)

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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise CallError(f"{key[:40]!r} is given twice")
        made[key] = value
    return made


_HOOKS: dict[str, Any] = {
    "parse_int": _integer,
    "parse_float": _float,
    "parse_constant": _constant,
    "object_pairs_hook": _object,
}
_STRICT = json.JSONDecoder(**_HOOKS)
_TOLERANT = json.JSONDecoder(**_HOOKS, strict=False)


def _not_json(fault: json.JSONDecodeError, text: str) -> CallError:
    """Return the error for the model: a text that ends within the value was cut off."""
    if text[fault.pos - 1 : fault.pos] == "0" and text[fault.pos : fault.pos + 1].isdecimal():
        return CallError(LEADING_ZERO)
    in_string = fault.msg.startswith("Unterminated string")
    rest = text[fault.pos : fault.pos + 8].rstrip()
    if in_string or any(word.startswith(rest) for word in ("true", "false", "null")):
        return CallError(CUT_JSON, is_cut=True, in_string=in_string)
    return CallError(f"not valid JSON ({fault.msg})", is_syntax=True)


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
