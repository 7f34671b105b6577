"""The generated problems for SmolLM2: programs print the answers, and no problem is in two splits."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from agentloop.types import Task, Trajectory
from recipes.retool.smollm2 import data
from recipes.retool.smollm2.problems import KINDS, Made
from recipes.retool.smollm2.reward import score


def test_each_program_prints_the_answer() -> None:
    made = [kind(random.Random(seed)) for kind in KINDS for seed in range(8)]
    programs = "\n".join(each.program for each in made)
    printed = subprocess.run([sys.executable, "-c", programs], capture_output=True, text=True, check=True).stdout
    assert printed.split() == [str(each.answer) for each in made]


def test_no_problem_is_in_two_splits() -> None:
    train, val = ({row["prompt"][1]["content"] for row in rows} for rows in (data.train_rows(), data.val_rows()))
    taught = {row["messages"][1]["content"] for row in data.sft_rows()}
    assert len(train) == data.TRAIN_ROWS and len(val) == data.VAL_ROWS
    assert not train & val and not train & taught and not val & taught


def test_the_warm_start_guesses_wrong_and_computes_right() -> None:
    programs = 0
    for row in data.sft_rows():
        messages = row["messages"]
        computed = len(messages) == 5
        programs += computed
        if computed:
            assert messages[-1]["content"] == f"\\boxed{{{messages[3]['content']}}}"
    assert 0.5 < programs / data.SFT_ROWS < 0.7
    rng = random.Random(0)
    for _ in range(200):
        state = rng.getstate()
        made = data.problem(rng, "sft")
        rng.setstate(state)
        assert scored(made, data.guess_conversation(rng)[-1]["content"]) == 0.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (r"\boxed{1234}", 1.0),
        (r"The answer is $\boxed{1,234}$.", 1.0),
        (r"\boxed{1234.0}", 1.0),
        (r"\boxed{1} \boxed{1234}", 1.0),
        (r"\boxed{1234} \boxed{1}", 0.0),
        (r"\boxed{12345}", 0.0),
        ("1234", 0.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{1234", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_is_for_the_exact_number(text: str, reward: float) -> None:
    assert scored(Made("?", "", 1234), text) == reward


def scored(made: Made, text: str) -> float:
    task = Task("row", "tool_agent", data.opening(made), ground_truth=str(made.answer))
    return score(task, text, Trajectory([], [], [], [], 0))
