"""Reward shaping and dynamic sampling: the numbers that recipes quote."""

from __future__ import annotations

import pytest

from trainer.algorithms.dynamic_sampling import replacement, teaches_nothing
from trainer.algorithms.shaping import overlong_penalty, wrong_answer


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0.0), (12288, 0.0), (13312, -0.25), (14336, -0.5), (16384, -1.0), (20000, -1.0)]
)
def test_soft_overlong_punishment_is_that_of_the_paper(length: int, expected: float) -> None:
    """L_max 16,384, L_cache 4,096: ((L_max - L_cache) - y) / L_cache."""
    assert overlong_penalty(length, 16384, 4096, 1.0) == expected
    assert overlong_penalty(length, 16384, 4096, 0.5) == expected / 2


@pytest.mark.parametrize(
    ("bonus", "cap", "rewards"),
    [
        (0.0, -0.6, [-1.0, -1.0, -1.0, -1.0]),  # flat
        (0.1, -0.6, [-1.0, -0.9, -0.6, -0.6]),  # bonus under a cap
        (0.1, None, [-1.0, -0.9, -0.5, 0.0]),  # the form that pays for calls without end
    ],
)
def test_wrong_answers_by_their_turns(bonus: float, cap: float | None, rewards: list[float]) -> None:
    assert [wrong_answer(turns, -1.0, bonus, cap) for turns in (1, 2, 6, 16)] == pytest.approx(rewards)


def test_a_group_teaches_nothing_only_if_what_was_scored_is_alike() -> None:
    assert teaches_nothing([1.0, 1.0, 1.0])
    assert not teaches_nothing([1.0, 0.0, 1.0])
    assert not teaches_nothing([1.0]), "a group whose episodes failed is no group without variance"
    assert not teaches_nothing([])


def test_replacements_are_other_rows_whatever_the_number_of_rows() -> None:
    assert replacement(7, 0) == 7
    for rows in (2, 5, 8, 1024, 7473, 17_000):
        chosen = [replacement(7, attempt) % rows for attempt in range(min(rows, 4))]
        assert len(set(chosen)) == len(chosen)
