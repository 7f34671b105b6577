"""JSON with exact integers, and lines that never fail to be written."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from agentloop.files import json_line, read_json


@pytest.mark.parametrize("number", [2**63, 2**64, 10**30 + 5, -(10**40), 12345678901234567890123])
def test_integers_of_any_size_stay_exact(number: int) -> None:
    assert read_json(b'{"a": [%d, 1.5, "x"]}' % number) == {"a": [number, 1.5, "x"]}
    assert read_json(json_line({"a": number})) == {"a": number}


@pytest.mark.parametrize("text", [b"{", b'{"a": 12345678901234567890123', b'{"a": 1}x', b"[" * 5000, b"\xff"])
def test_what_is_not_json_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        read_json(text)


def test_what_json_cannot_hold_becomes_what_comes_closest() -> None:
    value: dict[Any, Any] = {"text": "a\ud800b", 3: float("nan"), "array": np.array([1, 2]), "big": 2**70, "o": {1}}
    assert json.loads(json_line(value)) == {"text": "a?b", "3": None, "array": [1, 2], "big": 2**70, "o": "{1}"}
