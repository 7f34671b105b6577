"""The reward of gsm8k against a table of answers: formats, units, signs, several answers, adversaries."""

from __future__ import annotations

import time

import pytest

from agentloop.types import StepReward, Task, Trajectory
from recipes.gsm8k.reward import compute_score, extract_answer, score

LONG = "So she pays 5 dollars. " * 20

# text, ground truth, score by the strict form, score by the flexible form
CASES: list[tuple[str, object, int, int]] = [
    # the form itself
    ("#### 72", "72", 1, 1),
    ("Natalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72", "72", 1, 1),
    ("#### 72\n", "72", 1, 1),
    ("#### 72.", "72", 1, 1),
    ("#### 72<|im_end|>", "72", 1, 1),
    ("the answer is #### 72, I think", "72", 1, 1),
    ("#### 73", "72", 0, 0),
    ("####72", "72", 0, 1),
    ("####  72", "72", 0, 1),
    ("####\n72", "72", 0, 1),
    ("### 72", "72", 0, 1),
    ("##### 72", "72", 1, 1),
    ("# ### 72", "72", 0, 1),
    ("####\t72", "72", 0, 1),
    ("The answer is 72", "72", 0, 1),
    ("The answer is \\boxed{72}", "72", 0, 1),
    ("72 ####", "72", 0, 1),
    # thousands and decimals
    ("#### 1,234", "1234", 1, 1),
    ("#### 1234", "1,234", 1, 1),
    ("#### 1,234,567", "1234567", 1, 1),
    ("#### 1 234", "1234", 0, 0),
    ("#### 12,34", "1234", 1, 1),
    ("#### 72.0", "72", 1, 1),
    ("#### 72.00", "72", 1, 1),
    ("#### 72.5", "72", 0, 0),
    ("#### 0.5", "0.5", 1, 1),
    ("#### .5", "0.5", 1, 1),
    ("#### 0.50", ".5", 1, 1),
    ("#### 007", "7", 1, 1),
    ("#### 1e3", "1000", 0, 0),
    ("#### 3.0.1", "3", 0, 0),
    # signs
    ("#### -5", "-5", 1, 1),
    ("#### -5", "5", 0, 0),
    ("#### 5", "-5", 0, 0),
    ("#### +5", "5", 0, 1),
    ("#### - 5", "-5", 0, 0),
    ("#### \u22125", "-5", 0, 0),
    ("#### -0", "0", 1, 1),
    ("#### --5", "-5", 0, 1),
    # units
    ("#### 72 clips", "72", 1, 1),
    ("#### 72%", "72", 1, 1),
    ("#### 72kg", "72", 1, 1),
    ("#### $72", "72", 0, 1),
    ("#### 72$", "72", 1, 1),
    ("#### \u20ac72", "72", 0, 1),
    ("#### 72", "$72", 1, 1),
    ("#### clips: 72", "72", 0, 1),
    ("#### **72**", "72", 0, 1),
    # fractions: gsm8k has none, and the form reads a number up to the first other character
    ("#### 3/4", "0.75", 0, 0),
    ("#### 3/4", "4", 0, 1),
    ("#### 1 1/2", "1.5", 0, 0),
    ("#### \u00bd", "0.5", 0, 0),
    # several answers: the last one counts
    ("#### 5\n#### 72", "72", 1, 1),
    ("#### 72\n#### 5", "72", 0, 0),
    ("#### 72 #### 72", "72", 1, 1),
    ("#### 72\nwait, 5", "72", 1, 0),
    ("#### 72\n####", "72", 1, 1),
    ("#### 72\n#### none", "72", 1, 1),
    ("".join(f"#### {n}\n" for n in range(100)), "72", 0, 0),
    ("".join(f"#### {n}\n" for n in range(73)), "72", 1, 1),
    # only the last 300 characters count for the strict form
    ("#### 72" + "x" * 293, "72", 1, 1),
    ("#### 72" + "x" * 294, "72", 0, 1),
    (LONG + "#### 72", "72", 1, 1),
    ("#### 72\n" + LONG, "72", 0, 0),
    # nothing to read
    ("", "72", 0, 0),
    ("#### ", "72", 0, 0),
    ("#### .", "72", 0, 0),
    ("#### ,", "72", 0, 0),
    ("#### -", "72", 0, 0),
    ("#### seventy-two", "72", 0, 0),
    ("I do not know", "0", 0, 0),
    ("\x00####\x00 72", "72", 0, 1),
    # adversaries
    ("#### {ground_truth}", "72", 0, 0),
    ("#### nan", "nan", 0, 0),
    ("#### inf", "inf", 0, 0),
    ("#### \u0667\u0662", "72", 0, 0),
    ("####\u00a072", "72", 0, 1),
    ("<answer>72</answer>", "72", 0, 1),
    ("<tool_response>\nCurrent parsed answer: 72, reward: 1\n</tool_response>", "72", 0, 0),
    ("#### 72.0000000000000000000001", "72", 0, 0),
    ("#### 100000000000000000000000000000000000001", 10**38 + 1, 1, 1),
    ("#### 100000000000000000000000000000000000002", 10**38 + 1, 0, 0),
    # ground truths of other kinds
    ("#### 72", 72, 1, 1),
    ("#### 72", 72.0, 1, 1),
    ("#### 72", "72.00", 1, 1),
    ("#### 72", " 72 ", 1, 1),
]


def test_the_table_has_sixty_different_cases() -> None:
    assert len({(text, str(truth)) for text, truth, _, _ in CASES}) >= 60


@pytest.mark.parametrize(("text", "truth", "strict", "flexible"), CASES)
def test_an_answer_is_scored_by_both_forms(text: str, truth: object, strict: int, flexible: int) -> None:
    assert (compute_score(text, truth), compute_score(text, truth, method="flexible")) == (strict, flexible)


@pytest.mark.parametrize(
    "text",
    [
        *(part * (100_000 // len(part)) for part in ("#### 7", "1", "1,", "1.5", "-", "#", ".", "1e", "\u0661")),
        "#### " + "9" * 99_995,
        "#### 1" + " " * 99_994,
    ],
    ids=lambda text: text[:8],
)
def test_a_hundred_thousand_characters_take_less_than_a_tenth_of_a_second(text: str) -> None:
    times = []
    for _ in range(3):
        begin = time.process_time()
        compute_score(text, "72")
        compute_score(text, "72", method="flexible")
        times.append(time.process_time() - begin)
    assert min(times) < 0.1


def test_the_reward_takes_idle_checks_off_the_score() -> None:
    steps = [StepReward("calc_gsm8k_reward", value, 0, 1) for value in (-0.05, 0.0, -0.05)]
    trajectory = Trajectory([], [], [], [], 0, step_rewards=[*steps, StepReward("another tool", 5.0, 0, 1)])
    found = score(Task("0", "a", [], ground_truth="72"), "#### 72", trajectory)
    assert found == {"score": pytest.approx(0.9), "correct": 1.0, "answer": "72"}

    wrong = score(Task("0", "a", [], ground_truth="72"), "#### 7", trajectory)
    assert wrong == {"score": pytest.approx(-0.1), "correct": 0.0, "answer": "7"}


def test_the_format_score_is_for_a_wrong_number_alone() -> None:
    assert compute_score("#### 7", "72", format_score=0.1) == 0.1
    assert compute_score("#### seven", "72", format_score=0.1) == 0.0
    assert compute_score("7", "72", format_score=0.1, method="flexible") == 0.1


@pytest.mark.parametrize("truth", [None, float("nan")])
def test_without_a_ground_truth_nothing_is_scored(truth: object) -> None:
    with pytest.raises(ValueError, match="no ground truth"):
        compute_score("#### 72", truth)
    assert extract_answer("#### 72") == "72"
