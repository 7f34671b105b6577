r"""Reward: 1 for the exact number in the last `\boxed{}` of the final turn, else 0."""

from __future__ import annotations

from agentloop.numbers import same_number
from agentloop.reward.boxed import last_boxed
from agentloop.types import Task, Trajectory


def score(task: Task, text: str, trajectory: Trajectory) -> float:
    """Score the model's last turn.

    Args:
        text: the last assistant turn, decoded.
    """
    answer = last_boxed(text)
    return float(answer is not None and same_number(answer, task.ground_truth))
