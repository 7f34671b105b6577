"""Evaluation metrics against values counted by hand, and estimators against all possible draws."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from agentloop.types import EpisodeStatus, Trajectory, Turn
from agentloop.types import StopReason as Stop
from trainer.run.eval_metrics import Outcome, eval_metrics, final_answer, ks, majority_reward, pass_at_k


def outcome(row: int, reward: float | None, answer: str = "", source: str = "") -> Outcome:
    return Outcome(row, source, reward, answer, 0.0, 5)


def test_errors_of_tools_are_counted() -> None:
    with_tools = [
        Trajectory([1, 2], [0, 1], [0.0, -0.5], [None, 0], 1, metrics={"tool_calls": 4.0, "tool_errors": errors})
        for errors in (3.0, 0.0)
    ]
    metrics = eval_metrics([Outcome.of(0, [each]) for each in with_tools], n=1, pass_reward=1.0)
    assert (metrics["eval/tool_calls_mean"], metrics["eval/tool_errors_mean"]) == (4.0, 1.5)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_pass(n: int) -> None:
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            draws = list(itertools.combinations(samples, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws), abs=1e-12)


def test_every_power_of_two_up_to_n_has_a_pass_at_k() -> None:
    assert [ks(n) for n in (1, 2, 3, 4, 6, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_the_majority_is_the_most_frequent_answer_and_ties_are_shared() -> None:
    assert majority_reward([("7", 0.0), ("7", 0.0), ("8", 1.0)]) == 0.0
    assert majority_reward([("8", 1.0), ("7", 0.0), ("8", 1.0)]) == 1.0
    assert majority_reward([("8", 1.0), ("7", 0.0), ("7", 0.0), ("8", 1.0), ("9", 1.0)]) == 0.5
    assert majority_reward([("8", 1.0), ("8", 0.5), ("7", 0.0)]) == 0.75


def test_the_numbers_of_an_evaluation() -> None:
    metrics = eval_metrics(
        [
            *(outcome(0, r, a, "x") for r, a in [(1.0, "5"), (0.0, "6"), (0.0, "6"), (1.0, "5")]),
            *(outcome(1, r, a, "x") for r, a in [(0.5, "1"), (0.0, "2"), (0.0, "2"), (0.0, "2")]),
            *(outcome(2, r, a, "y/z") for r, a in [(1.0, "3"), (1.0, "3"), (0.0, "4"), (None, "")]),
        ],
        n=4,
        pass_reward=1.0,
    )
    assert metrics["eval/reward_mean"] == pytest.approx(4.5 / 11)
    assert (metrics["eval/episodes"], metrics["eval/failed"]) == (12, 1)
    assert metrics["eval/mean@4"] == pytest.approx((0.5 + 0.125 + 2 / 3) / 3)
    assert metrics["eval/pass@1"] == pytest.approx((0.5 + 0.0 + 2 / 3) / 3)
    assert metrics["eval/pass@2"] == pytest.approx((5 / 6 + 0.0 + 1.0) / 3)
    assert metrics["eval/pass@4"] == pytest.approx((1.0 + 0.0) / 2), "a row of three finished episodes has no pass@4"
    assert metrics["eval/maj@4"] == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    assert metrics["eval/x/reward_mean"] == pytest.approx(2.5 / 8) and metrics["eval/x/failed"] == 0
    assert metrics["eval/y/z/reward_mean"] == pytest.approx(2 / 3) and metrics["eval/y/z/failed"] == 1
    assert metrics["eval/y/z/pass@4"] is None


def test_failed_episodes_are_counted_and_are_no_reward_of_zero() -> None:
    metrics = eval_metrics([outcome(0, 1.0), outcome(1, None)], 1, 1.0)
    assert (metrics["eval/reward_mean"], metrics["eval/failed"], metrics["eval/pass@1"]) == (1.0, 1, 1.0)
    assert eval_metrics([outcome(0, None)], 1, 1.0)["eval/reward_mean"] is None
    assert not [key for key in metrics if "mean@" in key or "maj@" in key], "of one sample a row they say nothing more"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} no \boxed{\frac{1}{ 2}} it is", r"\frac{1}{ 2}"),
        (r"open \boxed{12", r"open \boxed{12"),
        ("1 + 1 = 2\n#### 3\n#### 2 \nthat is all", "2"),
        ("first\n\n  the   last line \n \n", "the last line"),
        ("", ""),
    ],
)
def test_the_answer_in_a_text(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_an_episode_votes_for_what_its_reward_read_else_for_its_last_text() -> None:
    def main(**changes: Any) -> Trajectory:
        turns = [Turn(1, 2, "#### 4", Stop.STOP)]
        return Trajectory([1, 2], [0, 1], [None, -1.0], [None, 3], 1, turns=turns, reward=1.0, **changes)

    fork = main(answer="fork")
    assert Outcome.of(3, [fork, main(answer="2")]) == Outcome(3, "", 1.0, "2", 0.0, 1)
    assert Outcome.of(3, [main(data_source="s")]) == Outcome(3, "s", 1.0, "4", 0.0, 1)
    assert Outcome.of(3, [main(status=EpisodeStatus.REJECTED)]).reward is None
