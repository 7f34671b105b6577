"""Read what user code returns as a number, and compare a model's answer with a row's ground truth.

Rewards come from numpy, torch, decimal and plain Python alike. No library is imported here: a
worker process that only scores must not load torch.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from numbers import Real
from typing import Any

_SPELLED = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d*)?(?:[eE][+-]?\d{1,3})?")


def real_number(value: Any) -> float:
    """Return a number as a float: Python's, `Decimal`, `Fraction`, booleans, numpy and torch.

    Arrays and tensors count if they hold one element. The result may be NaN or infinite.

    Raises:
        TypeError: the value is not a number; text is not one either.
        OverflowError: it is too large for a float.
    """
    if isinstance(value, Real | Decimal):
        return float(value)
    if isinstance(value, str | bytes | bytearray | memoryview) or not callable(getattr(value, "item", None)):
        raise TypeError(f"{type(value).__name__} is not a number")
    try:
        item = value.item()  # numpy's bool_, arrays and tensors of one element
    except (TypeError, ValueError, RuntimeError) as exc:
        raise TypeError(f"{type(value).__name__} does not hold one number") from exc
    if not isinstance(item, Real):
        raise TypeError(f"{type(value).__name__} does not hold a real number")
    return float(item)


def finite_number(value: Any) -> float | None:
    """Return `real_number(value)` if it is finite; None for everything else."""
    try:
        number = real_number(value)
    except (TypeError, OverflowError, ValueError):  # float(Decimal("sNaN")) is a ValueError
        return None
    return number if math.isfinite(number) else None


def parse_number(text: Any) -> Decimal | None:
    """Return the exact number that a text or value spells; None if it spells none.

    Thousands separators, a dollar sign and a final period are ignored: `$1,234.` is 1234. A float
    is read as it prints.
    """
    if isinstance(text, int):
        return Decimal(int(text))
    if not isinstance(text, str | Decimal):
        text = finite_number(text)
    spelled = str(text).strip().replace("$", "", 1).rstrip(".")
    if not any(map(str.isdigit, spelled)) or not _SPELLED.fullmatch(spelled):
        return None
    return Decimal(spelled.replace(",", ""))


def same_number(answer: Any, truth: Any) -> bool:
    """Whether an answer and a ground truth are the same number, or else the same text.

    `72`, `72.0`, `"72.00"` and `"72."` are equal: a column of integers with a gap becomes a column
    of floats in pandas and parquet. Integers are compared exactly, however large.

    Raises:
        ValueError: the ground truth is missing; a wrong answer must not be counted instead.
    """
    if truth is None or (isinstance(truth, float) and math.isnan(truth)):
        raise ValueError("the row has no ground truth to compare with")
    left, right = parse_number(answer), parse_number(truth)
    if left is not None and right is not None:
        return left == right
    return str(answer).strip() == str(truth).strip()
