"""What the three rewards of a wrong answer teach: a policy with one decision, "call again" or "answer".

The policy is a logit; its episodes are scored by the recipe's own reward functions, its advantages are those of GRPO
(the group's rewards, centred and scaled), its gradient is REINFORCE's. An answer is right with a chance that calls do
not change, and an episode whose turns run out has none: calls are worth nothing, whatever a reward pays for them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from agentloop.types import StopReason, Task, Trajectory, Turn
from recipes.retool.reward import score, score_capped, score_original

Reward = Callable[[Task, str, Trajectory], dict[str, float | str]]

GROUPS, GROUP_SIZE, LEARNING_RATE = 8, 8, 0.5
MOST_CALLS = 15
"""As in the recipe: 16 turns."""

TASK = Task("0", "tool_agent", [], ground_truth="34")


class Learned(NamedTuple):
    """Means over the episodes of a step, one for each step."""

    calls: list[float]
    right: list[float]

    def at(self, step: int) -> tuple[float, float]:
        """Return both as means over the 20 steps up to this one."""
        return sum(self.calls[step - 20 : step]) / 20, sum(self.right[step - 20 : step]) / 20


def episode(calls: int) -> Trajectory:
    turns = [Turn(start=n, end=n + 1, text="", stop_reason=StopReason.STOP) for n in range(1, calls + 2)]
    size = calls + 2
    columns: list[Any] = [[0] + [1] * (size - 1), [None] + [-0.5] * (size - 1), [None] + [0] * (size - 1)]
    return Trajectory(list(range(size)), *columns, 1, turns)


def learned(reward: Reward, steps: int, chance: float, most_calls: int = MOST_CALLS, seed: int = 0) -> Learned:
    """Train the policy; `chance`: of an answer to be right."""
    rng = random.Random(seed)
    earned = {
        text: [float(reward(TASK, text, episode(calls))["score"]) for calls in range(most_calls + 1)]
        for text in (r"\boxed{34}", r"\boxed{35}")
    }
    logit, found = -1.0, Learned([], [])
    for _ in range(steps):
        call = 1 / (1 + math.exp(-logit))
        gradient, calls_made, rights = 0.0, 0, 0
        for _ in range(GROUPS):
            group = []
            for _ in range(GROUP_SIZE):
                calls = 0
                while calls < most_calls and rng.random() < call:
                    calls += 1
                right = calls < most_calls and rng.random() < chance
                group.append((calls, earned[r"\boxed{34}" if right else r"\boxed{35}"][calls]))
                calls_made, rights = calls_made + calls, rights + right
            mean = sum(each for _, each in group) / GROUP_SIZE
            deviation = math.sqrt(sum((each - mean) ** 2 for _, each in group) / GROUP_SIZE)
            for calls, each in group:
                # d log p / d logit: each call adds 1 - p, the answer (if a turn was left for it) takes p.
                score_function = calls * (1 - call) - (call if calls < most_calls else 0.0)
                gradient += (each - mean) / (deviation + 1e-6) * score_function
        logit += LEARNING_RATE * gradient / (GROUPS * GROUP_SIZE)
        found.calls.append(calls_made / (GROUPS * GROUP_SIZE))
        found.right.append(rights / (GROUPS * GROUP_SIZE))
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_original_bonus_ends_in_nothing_but_calls(seed: int) -> None:
    """Three answers in ten are right at first, and none at last: no turn is left to answer."""
    found = learned(score_original, 400, 0.3, seed=seed)
    (calls, right), (first_calls, first_right) = found.at(400), found.at(20)
    assert first_calls < 1 and first_right > 0.2
    assert calls > 14 and right < 0.05


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_flat_reward_pays_for_answers_only(seed: int) -> None:
    calls, right = learned(score, 400, 0.3, seed=seed).at(400)
    assert calls < 1 and right > 0.2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_capped_bonus_teaches_a_few_calls_and_keeps_the_answers(seed: int) -> None:
    calls, right = learned(score_capped, 400, 0.3, seed=seed).at(400)
    assert 3 < calls < 8 and right > 0.2


def test_where_every_answer_is_wrong_the_calls_of_the_original_grow_with_the_limit() -> None:
    """The limit of turns is all that ends them, although the bonus itself ends at ten calls."""
    calls = [learned(score_original, 300, 0.0, most_calls=most).at(300)[0] for most in (15, 50, 150)]
    assert calls[0] > 14 and calls[1] > 45 and calls[2] > 135


def test_where_every_answer_is_wrong_only_the_flat_reward_teaches_nothing() -> None:
    """The cap does not help there: GRPO scales the small differences that it leaves. The README says so."""
    assert learned(score, 300, 0.0).at(300)[0] < 0.6
    assert learned(score_capped, 300, 0.0).at(300)[0] > 14
