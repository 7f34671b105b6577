"""Read Python literals and calls, `f(a="x", n=1)`, without evaluating anything.

Python's parser is not used: it refuses names such as `get-weather` and arguments such as `from`,
cannot find the end of a call within a text, warns about the backslashes of regular expressions, and
fails on deep nesting in several ways.
"""

from __future__ import annotations

import re
from typing import Any

from agentloop.chat.call_json import DEEPEST, LEADING_ZERO, CallError, read_json
from agentloop.chat.sampled import skip_space
from agentloop.types import ToolCall

NAME = r"[^\s()\[\]{}=,:;'\"<>|`]+"
"""Pattern of the name of a tool or argument: more than Python allows."""

_NAME = re.compile(NAME)
_CALL = re.compile(rf"{NAME}\s*\(")
_STRING = re.compile(
    r"""(?P<raw>[rR]?)(?:'''(?P<a>(?:[^\\]|\\.)*?)'''|\"\"\"(?P<b>(?:[^\\]|\\.)*?)\"\"\"|"""
    r"""'(?P<c>(?:[^'\\]|\\.)*)'|"(?P<d>(?:[^"\\]|\\.)*)")""",
    re.DOTALL,
)
_NUMBER = re.compile(r"([+-]?)(\d*)(\.\d*)?([eE][+-]?\d+)?(?![\w.])")
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_ESCAPE = re.compile(r"\\(\n|[0-7]{1,3}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
_ESCAPES = {
    "\n": "",
    "\\": "\\",
    "'": "'",
    '"': '"',
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
}


def read_literal(text: str, start: int) -> tuple[Any, int]:
    """Read the literal that begins at `text[start]`, after white space; return it and its end.

    Raises:
        CallError: there is no string, number, True, False, None, list or dict of these.
    """
    return _read(text, skip_space(text, start), DEEPEST)


def begins_call(text: str, start: int) -> bool:
    """Whether a name and an opening parenthesis are at `text[start]`."""
    return _CALL.match(text, start) is not None


def read_python_call(text: str, start: int) -> tuple[ToolCall, int]:
    """Read the call that begins at `text[start]`; return it and the position after it.

    Raises:
        CallError: there is no call whose arguments are keyword arguments with literal values.
    """
    name = _NAME.match(text, start)
    if name is None:
        raise CallError("a call is written as name(key=value)")
    end = skip_space(text, name.end())
    if not text.startswith("(", end):
        raise CallError(f"{name[0]!r} must be followed by its arguments in parentheses")

    call = ToolCall(name[0], {})
    end = skip_space(text, end + 1)
    while not text.startswith(")", end):
        key = _NAME.match(text, end)
        after = skip_space(text, key.end()) if key else end
        if key is None or not text.startswith("=", after):
            raise CallError(f"the arguments of {name[0]} must be written as key=value")
        if key[0] in call.arguments:
            raise CallError(f"the argument {key[0]!r} is given twice")

        call.arguments[key[0]], end = _read(text, skip_space(text, after + 1), DEEPEST - 1)
        end = _next(text, end, ")")
    return call, end + 1


def _next(text: str, position: int, close: str) -> int:
    """Return the position after the comma that follows an item, or of the closing bracket."""
    position = skip_space(text, position)
    if text.startswith(",", position):
        return skip_space(text, position + 1)
    if not text.startswith(close, position):
        raise CallError(f"each value must be followed by a comma or {close}")
    return position


def _read(text: str, start: int, levels: int) -> tuple[Any, int]:
    """Read the literal at `start`; return it and the position after it.

    Args:
        levels: levels of nesting that are left.
    """
    opening = text[start : start + 1]
    if opening in ("[", "{"):
        if not levels:
            raise CallError(f"nested in more than {DEEPEST} levels")
        return _read_list(text, start, levels - 1) if opening == "[" else _read_dict(text, start, levels - 1)

    string = _STRING.match(text, start)
    if string:
        return _string(text, start, string), string.end()

    word = _NAME.match(text, start)
    if word and word[0] in _WORDS:
        return _WORDS[word[0]], word.end()

    number = _NUMBER.match(text, start)
    if number and len(number[2]) > 1 and number[2][0] == "0":
        raise CallError(LEADING_ZERO)
    if number and (number[2] or (number[3] or "") > "."):
        sign, whole, fraction, exponent = (part or "" for part in number.groups())
        fraction = f"{fraction}0" if fraction == "." else fraction
        spelled = f"{sign.removeprefix('+')}{whole or '0'}{fraction}{exponent}"
        value, end = read_json(spelled, 0)
        if end == len(spelled):
            return value, number.end()

    if start == len(text) or opening in ("'", '"'):
        raise CallError("cut off before the call ends", is_cut=True, in_string=start < len(text))
    raise CallError(f"{text[start : start + 20]!r} is not a string, number, True, False, None, list or dict")


def _read_list(text: str, start: int, levels: int) -> tuple[list[Any], int]:
    items: list[Any] = []
    end = skip_space(text, start + 1)
    while not text.startswith("]", end):
        item, end = _read(text, end, levels)
        items.append(item)
        end = _next(text, end, "]")
    return items, end + 1


def _read_dict(text: str, start: int, levels: int) -> tuple[dict[str, Any], int]:
    items: dict[str, Any] = {}
    end = skip_space(text, start + 1)
    while not text.startswith("}", end):
        key, end = _read(text, end, 0)
        end = skip_space(text, end)
        if not isinstance(key, str) or not text.startswith(":", end):
            raise CallError("a dict is written as {'key': value}, its keys strings")

        if key in items:
            raise CallError(f"{key[:40]!r} is given twice")
        items[key], end = _read(text, skip_space(text, end + 1), levels)
        end = _next(text, end, "}")
    return items, end + 1


def _string(text: str, start: int, match: re.Match[str]) -> str:
    body = next(match[name] for name in "abcd" if match[name] is not None)
    if match["raw"] or "\\" not in body:
        return body

    if match["d"] is not None:
        try:
            # Templates write strings as JSON, in which \/ and surrogate pairs have a meaning.
            value, end = read_json(text, start, raw_newlines=True)
            if end == match.end():
                return str(value)
        except CallError:
            pass

    result = _ESCAPE.sub(_unescape, body)
    try:
        result.encode()
    except UnicodeEncodeError as exc:
        raise CallError("half of a surrogate pair, which is not a character") from exc
    return result


def _unescape(match: re.Match[str]) -> str:
    code = match[1]
    if len(code) > 1 or code in "01234567":
        number = int(code, 8) if code[0] in "01234567" else int(code[1:], 16)
        return chr(number) if number <= 0x10FFFF else match[0]
    return _ESCAPES.get(code, match[0])  # Python also keeps the backslash of an unknown escape
