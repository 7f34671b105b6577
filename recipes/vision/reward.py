"""Reward of the vision recipe: 1 for the number after the last `####`, else 0."""

from __future__ import annotations

import re

from agentloop.numbers import same_number
from agentloop.types import Task, Trajectory

ANSWER = re.compile(r"#### (-?\d+)\s*$")


def score(task: Task, text: str, trajectory: Trajectory) -> float:
    """Score the model's last turn.

    Args:
        text: the last assistant turn, decoded.
    """
    match = ANSWER.search(text)
    # As numbers: a column of integers with a gap holds 72.0 in place of 72.
    return float(same_number(match.group(1) if match is not None else "", task.ground_truth))
