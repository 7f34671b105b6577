"""Reward: 1 for the exact number after the last `####` of the final turn, else 0."""

from __future__ import annotations

import re

from agentloop.numbers import same_number
from agentloop.types import Task, Trajectory

ANSWER = re.compile(r"####\s*(\S+)$")

TAIL_CHARACTERS = 200
"""Searched for the answer: in a long row of `#`, the search would take the square of its length."""


def score(task: Task, text: str, trajectory: Trajectory) -> float:
    """Score the model's last turn.

    Args:
        text: the last assistant turn, decoded.
    """
    match = ANSWER.search(text.rstrip()[-TAIL_CHARACTERS:])
    # As numbers: 1,234.50 is 1234.5.
    return float(match is not None and same_number(match.group(1), task.ground_truth))
