"""Call a reward function, and read what it returns."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

from agentloop.client.time_limit import TimeLimit
from agentloop.errors import RewardError
from agentloop.faults import contained
from agentloop.numbers import finite_number
from agentloop.reward.loading import RewardFunction
from agentloop.runtime.isolation import describe
from agentloop.types import Task, Trajectory

ANSWER = "answer"
"""Key under which a reward function returns the answer it read; maj@n counts equal answers as one
vote each."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a reward function returned: the score, its named parts, the answer that it read."""

    score: float
    parts: dict[str, float]
    answer: str | None = None


async def call_reward(function: RewardFunction, task: Task, main: Trajectory, timeout_s: float) -> Verdict:
    """Score an episode.

    Args:
        main: its last trajectory; the text that is scored is that of its last turn.

    Raises:
        RewardError: the function raised, took too long or did not return finite numbers.
    """
    text = main.turns[-1].text if main.turns else ""
    clock = TimeLimit(timeout_s)
    try:
        async with clock:
            with contained():
                result: Any = await function(task, text, main)
    except Exception as exc:
        if isinstance(exc, TimeoutError) and clock.expired():
            raise RewardError(f"the reward took longer than {timeout_s:g} s", "raise reward_timeout_s") from exc
        raise RewardError(f"the reward raised {describe(exc)}") from exc

    numbers = dict(result) if isinstance(result, dict) else {"score": result}
    answer = numbers.pop(ANSWER, None)
    if "score" not in numbers:
        raise RewardError(f"the reward returned {reprlib.repr(result)}, which has no 'score'", "add the key 'score'")

    parts: dict[str, float] = {}
    for key, value in numbers.items():
        number = finite_number(value)
        if number is None:
            raise RewardError(
                f"the reward returned {reprlib.repr(value)} as {key}, not a finite number",
                f"return float(...) of its text, not the text, for {key}"
                if isinstance(value, str)
                else "return finite numbers from it",
            )
        parts[str(key)] = number
    return Verdict(parts.pop("score"), parts, None if answer is None else str(answer))
