"""JSON that keeps integers of any size, and never fails on what a model or a user wrote."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import orjson


def json_line(value: Any) -> bytes:
    """Return a value as one line of JSON, numpy arrays included.

    What JSON in UTF-8 cannot hold becomes what comes closest: a lone surrogate `?`, NaN `null`, any
    other object its text. Integers of any size stay exact: models write such arguments into calls.
    """
    try:
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY, default=str) + b"\n"
    except TypeError:  # a lone surrogate, an integer of more than 64 bits, a key that is not text
        return json.dumps(_plain(value), ensure_ascii=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(_plain(str(key))): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a numpy array or number
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bool | int | None):
        return value
    return str(value).encode("utf-8", "replace").decode()


_LONG_NUMBER = re.compile(rb"[0-9]{19}")
"""What may be an integer of more than 64 bits, which orjson would read as a float."""


def read_json(text: bytes) -> Any:
    """Read JSON in UTF-8 with exact integers, however large.

    Raises:
        ValueError: it is not JSON.
    """
    found = orjson.loads(text)
    if not _LONG_NUMBER.search(text):
        return found
    try:
        return json.loads(text)
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc
