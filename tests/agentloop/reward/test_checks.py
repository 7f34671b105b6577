"""A reward of the wrong signature is refused when it is loaded; what it reads is known from its code."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from agentloop.config import RewardConfig
from agentloop.errors import ConfigError, RewardError
from agentloop.reward.calling import call_reward
from agentloop.reward.checks import check_reward, mentions
from agentloop.reward.loading import load_reward, reads_ground_truth
from agentloop.types import Task, Trajectory


def two(task: Any, text: str) -> float:
    return 1.0


def four(task: Any, text: str, trajectory: Any, more: int) -> float:
    return 1.0


def keywords(task: Any, *, text: str, trajectory: Any) -> float:
    return 1.0


def yields(task: Any, text: str, trajectory: Any) -> Any:
    yield 1.0


def verl(data_source: str, solution_str: str, ground_truth: str) -> float:
    return 1.0


def swapped(text: str, task: Any, trajectory: Any) -> float:
    return 1.0


class Scorer:
    async def __call__(self, task: Any, text: str, trajectory: Any) -> float:
        return float(task.ground_truth == "1")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (two, "cannot be called with a task, a text and a trajectory: too many positional arguments"),
        (four, "missing a required argument: 'more'"),
        (keywords, "too many positional arguments"),
        (yields, "is a generator"),
        (verl, "its argument 'data_source' would receive the task"),
        (swapped, "its argument 'text' would receive the task"),
        (Scorer, "is not a function"),
        (3, "is not a function"),
    ],
)
def test_what_cannot_score_is_refused(function: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_reward(function, "r.py:score")
    assert says in str(caught.value) and "reward: r.py:score" in str(caught.value) and caught.value.hint


def test_what_can_is_accepted() -> None:
    for function in (
        Scorer(),
        functools.partial(four, more=1),
        lambda *a: 1.0,
        lambda task, text, trajectory, x=1: 1.0,
        max,
    ):
        check_reward(function, "r")


async def test_an_object_with_an_async_method_is_awaited(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "class Scorer:\n    async def __call__(self, task, text, trajectory):\n        return 0.5\nscore = Scorer()\n"
    )
    reward = load_reward(RewardConfig(function=f"{tmp_path / 'r.py'}:score"))
    assert reward is not None and await reward(Task("0", "a", []), "", None) == 0.5  # type: ignore[arg-type]


def helper(task: Any) -> Any:
    return [task.ground_truth for _ in range(1)]


def test_what_a_function_reads_is_found_in_its_code_and_its_helpers() -> None:
    assert mentions(lambda task, text, trajectory: helper(task), "ground_truth")
    assert mentions(Scorer(), "ground_truth") and mentions(functools.partial(helper), "ground_truth")
    assert mentions(lambda t: getattr(t, "ground_truth"), "ground_truth")  # noqa: B009
    assert mentions(lambda f: f(reward=1), "reward")
    assert not mentions(two, "ground_truth") and not mentions(max, "ground_truth") and not mentions(3, "x")
    assert reads_ground_truth(RewardConfig(function="gsm8k")) and not reads_ground_truth(None)


@pytest.mark.parametrize("returned", ["0.5", {"score": 1.0, "format": "yes"}])
async def test_a_reward_that_returns_text_is_told_to_convert_it(returned: Any) -> None:
    async def reward(*_: Any) -> Any:
        return returned

    task = Task(task_id="7", agent_name="a", prompt=[{"role": "user", "content": "1"}])
    with pytest.raises(RewardError, match="not a finite number") as caught:
        await call_reward(reward, task, Trajectory([1], [0], [None], [None], 1, task_id="7"), 1.0)
    assert "return float(...)" in (caught.value.hint or "")
