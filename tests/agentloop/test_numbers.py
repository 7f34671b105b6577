"""What counts as a number: rewards of every library, and answers against ground truths."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from agentloop.numbers import finite_number, parse_number, same_number


class Tensor:
    """Of one element, as torch's: no numbers.Real, and `item` gives a Python number."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def item(self) -> Any:
        if len(self.values) != 1:
            raise RuntimeError("a Tensor with 2 elements cannot be converted to Scalar")
        return self.values[0]


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1.0),
        (True, 1.0),
        (np.True_, 1.0),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.array(0.5), 0.5),
        (np.array([0.5]), 0.5),
        (Decimal("0.5"), 0.5),
        (Fraction(1, 2), 0.5),
        (Tensor(0.5), 0.5),
        (Tensor(True), 1.0),
    ],
)
def test_numbers_of_any_library_are_read(value: Any, number: float) -> None:
    assert finite_number(value) == number and type(finite_number(value)) is float


@pytest.mark.parametrize(
    "value",
    [
        *(None, "1", b"1", [1.0], {"a": 1}, 1j, float("nan"), float("inf"), np.nan, 10**400),
        *(Decimal("sNaN"), Decimal("Infinity"), np.array([1.0, 2.0]), np.array("x")),
        *(Tensor(1.0, 2.0), Tensor("x"), Tensor(float("nan"))),
    ],
)  # fmt: skip
def test_everything_else_is_refused(value: Any) -> None:
    assert finite_number(value) is None


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("72", 72.0),
        ("72.00", 72),
        ("72.", "72"),
        ("$1,234", 1234),
        ("1234", "1,234"),
        ("0.5", ".50"),
        ("-3", np.int64(-3)),
        ("0.1", 0.1),
        (str(10**30 + 5), 10**30 + 5),
        ("1000000", 1e6),
        (" yes ", "yes"),
        ("1,2", "1,2"),
        (True, 1),
    ],
)
def test_equal_numbers_are_the_same(answer: Any, truth: Any) -> None:
    assert same_number(answer, truth)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("72", 73.0),
        (str(10**30 + 5), 10**30 + 6),
        (str(10**30), 10**30 + 5),
        ("1,2", 12),
        ("", 0),
        ("no", "yes"),
        ("٣²", 3),
        ("10", True),
    ],
)
def test_different_ones_are_not(answer: Any, truth: Any) -> None:
    assert not same_number(answer, truth)


@pytest.mark.parametrize("truth", [None, float("nan")])
def test_a_missing_ground_truth_is_not_a_wrong_answer(truth: Any) -> None:
    with pytest.raises(ValueError, match="no ground truth"):
        same_number("1", truth)


def test_a_huge_integer_is_exact() -> None:
    assert parse_number(10**5000) == Decimal(10) ** 5000
