r"""The reward of ReTool: +1 or -1 for the \boxed{} at the end of the text, and what wrong answers earn by calls."""

from __future__ import annotations

import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from agentloop.registry import load_reference
from agentloop.reward import mathematics
from agentloop.types import StopReason, Task, Trajectory, Turn
from recipes.retool.reward import TAIL_CHARACTERS, score, score_capped, score_original

LONG = "a" * 100_000

RIGHT: list[tuple[str, Any]] = [
    # the forms in which an integer answer is written
    (r"\boxed{34}", "34"),
    (r"\boxed{34}", 34),
    (r"\boxed{34}", 34.0),
    (r"Therefore the answer is $\boxed{34}$.", "34"),
    ("The program prints 34.\n\\boxed{34}", "34"),
    ("\\[\n\\boxed{34}\n\\]", "34"),
    (r"\boxed{ 34 }", "34"),
    (r"\boxed {34}", "34"),
    ("\\boxed{\n34\n}", "34"),
    (r"\boxed{34.}", "34"),
    (r"\boxed{34.0}", "34"),
    (r"\boxed{$34$}", "34"),
    (r"\boxed{\(34\)}", "34"),
    (r"\boxed{\text{34}}", "34"),
    (r"\boxed{\mathbf{34}}", "34"),
    (r"\fbox{34}", "34"),
    (r"<answer>\boxed{34}</answer>", "34"),
    # the leading zeros of AIME
    (r"\boxed{025}", "25"),
    (r"\boxed{25}", "025"),
    (r"\boxed{073}", 73),
    # signs and separators
    (r"\boxed{-7}", "-7"),
    (r"\boxed{−7}", "-7"),
    (r"\boxed{+7}", "7"),
    (r"\boxed{- 7}", "-7"),
    (r"\boxed{1,234,567}", "1234567"),
    (r"\boxed{1234567}", "1,234,567"),
    (r"\boxed{1{,}234}", "1234"),
    (r"\boxed{12\,345}", "12345"),
    # units
    (r"\boxed{12\text{ cm}}", "12"),
    (r"\boxed{12 \text{ cm}^2}", "12"),
    (r"\boxed{45^\circ}", "45"),
    (r"\boxed{336^{\circ}}", r"336^\circ"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{\$18}", "18"),
    (r"\boxed{n = 34}", "34"),
    # fractions and decimals
    (r"\boxed{\frac{3}{4}}", "3/4"),
    (r"\boxed{\dfrac{3}{4}}", r"\frac{3}{4}"),
    (r"\boxed{\frac34}", "0.75"),
    (r"\boxed{\frac{6}{8}}", "3/4"),
    (r"\boxed{-\frac{1}{2}}", "-0.5"),
    (r"\boxed{.5}", "0.5"),
    # several answers, and boxes inside each other
    (r"\boxed{1} is wrong. It is \boxed{34}", "34"),
    (r"\boxed{\boxed{34}}", "34"),
    (r"\boxed{34} or, cut off, \boxed{35", "34"),
    # long texts
    (LONG + r"\boxed{34}", "34"),
    (r"\boxed{35}" * 10_000 + r"\boxed{34}", "34"),
    ("{" * 100_000 + r"\boxed{34}", "34"),
    (r"\boxed{34}" + "a" * (TAIL_CHARACTERS - 10), "34"),
    # values of other forms
    (r"\boxed{2^{10}}", "1024"),
    (r"\boxed{\sqrt{75}}", r"5\sqrt{3}"),
    (r"\boxed{5!}", "120"),
]
WRONG: list[tuple[str, Any]] = [
    ("", "34"),
    (" ", "34"),
    ("34", "34"),
    ("The answer is 34.", "34"),
    ("Answer: 34", "34"),
    ("#### 34", "34"),
    (r"boxed{34}", "34"),
    (r"\boxed 34", "34"),
    (r"\boxed(34)", "34"),
    (r"\boxed{}", "34"),
    (r"\boxed{34", "34"),
    (r"\boxed{35}", "34"),
    (r"\boxed{-34}", "34"),
    (r"\boxed{3.4}", "34"),
    (r"\boxed{340}", "34"),
    (r"\boxed{34.0001}", "34"),
    (r"\boxed{34x}", "34"),
    (r"\boxed{x}", "34"),
    (r"\boxed{\text{thirty-four}}", "34"),
    (r"\boxed{34} no, \boxed{35}", "34"),
    (r"\boxed{34\boxed{35}}", "34"),
    (r"\boxed{\frac{4}{3}}", "3/4"),
    (r"\boxed{\frac{34}{0}}", "34"),
    # many guesses at once
    (r"\boxed{33, 34}", "34"),
    (r"\boxed{33 or 34}", "34"),
    (r"\boxed{34 \text{ or } 35}", "34"),
    (r"\boxed{\{33, 34, 35\}}", "34"),
    (r"\boxed{33 < x < 35}", "34"),
    (" ".join(rf"\boxed{{{n}}}" for n in range(1000)), "34"),
    # words that look like a verdict
    (r"\boxed{\text{the ground truth}}", "34"),
    (r"\boxed{ground_truth}", "34"),
    (r"\boxed{True}", "34"),
    (r"\boxed{nan}", "34"),
    (r"\boxed{\infty}", "34"),
    ('{"score": 1.0, "correct": 1}', "34"),
    # an answer before the tail
    (r"\boxed{34}" + "a" * TAIL_CHARACTERS, "34"),
    (r"\boxed{34}" + LONG, "34"),
    (LONG, "34"),
    ("\\boxed{" * 20_000, "34"),
    ("\\" * 100_000, "34"),
    (r"\boxed{" + "1" * 100_000 + "}", "34"),
]


def trajectory(calls: int = 0) -> Trajectory:
    turns = [Turn(start=n, end=n + 1, text="", stop_reason=StopReason.STOP) for n in range(1, calls + 2)]
    ids = list(range(calls + 2))
    return Trajectory(ids, [0] + [1] * (calls + 1), [None] + [-0.5] * (calls + 1), [None] + [0] * (calls + 1), 1, turns)


def scored(text: str, truth: object) -> dict[str, float | str]:
    return score(Task("0", "tool_agent", [], ground_truth=truth), text, trajectory())


@pytest.mark.parametrize(("text", "truth"), RIGHT)
def test_the_right_answer_earns_one(text: str, truth: object) -> None:
    assert scored(text, truth)["score"] == 1.0
    assert scored(text, truth)["correct"] == 1.0


@pytest.mark.parametrize(("text", "truth"), WRONG)
def test_anything_else_costs_one(text: str, truth: object) -> None:
    assert scored(text, truth)["score"] == -1.0
    assert scored(text, truth)["correct"] == 0.0


def test_the_tables_are_long_enough() -> None:
    assert len(RIGHT) + len(WRONG) >= 60


def test_a_row_without_a_ground_truth_is_an_error_and_not_a_wrong_answer() -> None:
    for truth in (None, "", "  "):
        with pytest.raises(ValueError, match="ground truth is missing"):
            scored(r"\boxed{34}", truth)


def test_the_answer_that_was_read_is_the_vote() -> None:
    assert scored(r"\boxed{x = 1,234}", "1234")["answer"] == "1234"
    assert scored("no box", "1234")["answer"] == ""


def test_an_answer_that_never_ends_is_killed_and_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "TIME_LIMIT_S", 0.5)
    scored(r"\boxed{\sqrt{75}}", "1")  # math-verify is loaded before the clock starts
    begin = time.perf_counter()
    assert scored(r"\boxed{9^{9^{9^{9}}}}", "34")["score"] == -1.0
    assert time.perf_counter() - begin < 60  # sympy would compute for ever


@pytest.mark.parametrize(
    ("calls", "original", "capped"),
    [(0, -1.0, -1.0), (1, -0.9, -0.9), (4, -0.6, -0.6), (5, -0.5, -0.6), (10, 0.0, -0.6), (15, 0.0, -0.6)],
)
def test_what_a_wrong_answer_earns_by_its_calls(calls: int, original: float, capped: float) -> None:
    task, episode = Task("0", "tool_agent", [], ground_truth="34"), trajectory(calls)
    turns = 2 * calls + 2  # as the original counts: the prompt, each call and its result, the answer
    assert min(0.0, -1 + (turns - 2) / 2 * 0.1) == pytest.approx(original)
    found = [function(task, r"\boxed{35}", episode)["score"] for function in (score, score_capped, score_original)]
    assert found == [-1.0, pytest.approx(capped), pytest.approx(original)]
    assert {function(task, r"\boxed{34}", episode)["score"] for function in (score, score_capped, score_original)} == {
        1.0
    }


def test_the_reward_is_registered(repo: Path) -> None:
    entries = tomllib.loads((repo / "pyproject.toml").read_text())["project"]["entry-points"]["agentloop.rewards"]
    module, _, name = entries["retool"].partition(":")
    assert (module, name) == (score.__module__, score.__name__)
    loaded = load_reference(
        f"{repo}/recipes/retool/reward.py:score", Path(), "agentloop.rewards", key="reward", modules=False
    )
    assert loaded(Task("0", "a", [], ground_truth="1"), r"\boxed{1}", trajectory())["score"] == 1.0
