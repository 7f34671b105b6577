"""Reward of the quickstart: 1 for the exact number after the last `####`, else 0."""

from __future__ import annotations

import re

from agentloop.types import Task, Trajectory

ANSWER = re.compile(r"#### (-?\d+)\s*$")


def score(task: Task, text: str, trajectory: Trajectory) -> float:
    """Score the model's last turn.

    Args:
        text: the last assistant turn, decoded.
    """
    match = ANSWER.search(text)
    return float(match is not None and match.group(1) == task.ground_truth)
