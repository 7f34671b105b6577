"""JSON that reads back as it was written: NaN, integers of any size, lone surrogates.

The common case takes orjson. What orjson would alter or refuse takes the standard library, whose
output is ASCII with `NaN` and `Infinity`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import orjson

from agentloop.files import read_json

DEEPEST = 200
"""Levels of nesting that are written; a deeper value becomes its text."""


def dump(value: Any, nones: int = 0) -> str:
    """Return a value as JSON. Dataclasses are objects; what JSON cannot hold becomes its text.

    Args:
        nones: how many None the value is known to hold. It only saves time: with exactly as many
            nulls in the text, no number was lost.
    """
    try:
        text = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY, default=text_of)
    except TypeError:  # a lone surrogate, an integer of more than 64 bits, a key that is not text
        return _dump_slowly(value)
    if text.count(b"null") != nones and has_odd_float(value):  # orjson writes null for NaN
        return _dump_slowly(value)
    return text.decode()


def load(text: str) -> Any:
    """Read what `dump` returned.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return read_json(text.encode())
    except ValueError:  # NaN, Infinity or an escaped lone surrogate
        return json.loads(text)


def _dump_slowly(value: Any) -> str:
    return json.dumps(_plain(value, set()))


def _plain(value: Any, above: set[int]) -> Any:
    """Return a value that `json` writes.

    Args:
        above: ids of what it is in. A value that is in itself, such as a node of a tree with its
            parent, becomes its text there: its ways through itself are without number.
    """
    if value is None or isinstance(value, str | bool | int | float):
        # Of a subclass such as an enumeration or numpy's float64, the plain value.
        return next((kind(value) for kind in (str, int, float) if isinstance(value, kind)), value)
    if len(above) > DEEPEST or id(value) in above:
        return str(type(value).__name__)
    above.add(id(value))
    try:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: _plain(getattr(value, f.name), above) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {_key(key): _plain(item, above) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [_plain(item, above) for item in value]
        if hasattr(value, "tolist"):  # a numpy array or number
            return _plain(value.tolist(), above)
        if isinstance(value, Enum):  # as orjson does
            return _plain(value.value, above)
        return text_of(value)
    finally:
        above.remove(id(value))


def _key(key: Any) -> str:
    return text_of(key.value if hasattr(key, "value") else key)


def text_of(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001  # a user's own `__str__`
        return f"(a {type(value).__name__} that has no text)"


def has_odd_float(value: Any) -> bool:
    """Whether a value holds a NaN or an infinity at any depth. A loop, because every step's turns
    pass through it."""
    stack = [value]
    while stack:
        value = stack.pop()
        kind: Any = type(value)
        if kind in _NO_FLOATS:
            continue
        if isinstance(value, float):
            if value - value != 0.0:
                return True
        elif isinstance(value, list | tuple):
            stack += value
        elif isinstance(value, dict):
            stack += value.values()
        elif (fields_of := _fields_of(kind)) is not None:
            stack += fields_of(value)
        elif isinstance(value, Enum):
            stack.append(value.value)
        elif not isinstance(value, str | int) and hasattr(value, "tolist"):
            stack.append(value.tolist())
    return False


_NO_FLOATS = frozenset({str, int, bool, type(None)})


@functools.cache
def _fields_of(kind: type) -> Callable[[Any], tuple[Any, ...]] | None:
    """Return a function that returns the fields of a dataclass; None for other classes."""
    if not dataclasses.is_dataclass(kind):
        return None
    names = [f.name for f in dataclasses.fields(kind)]
    return lambda value: tuple([getattr(value, name) for name in names])
