"""Reward of gsm8k: 1 if the number after the last `####` is correct, else 0; idle checks cost."""

from __future__ import annotations

import math
import re
from typing import Literal

from agentloop.numbers import same_number
from agentloop.types import Task, Trajectory

STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?[0-9][0-9.,]*|-?\.[0-9]+")

TOOL = "calc_gsm8k_reward"
"""Name of the checking tool in `tools.yaml`."""

TAIL_CHARACTERS = 300
"""The strict form searches only this many characters at the end of the text.

A long text cannot hide many guesses, and the regular expression stays cheap.
"""


def extract_answer(text: str, method: Literal["strict", "flexible"] = "strict") -> str | None:
    """Return the answer in a solution, or None.

    Args:
        method: `strict`: the number after the last `#### `; `flexible`: the last number anywhere.
    """
    found = STRICT.findall(text[-TAIL_CHARACTERS:]) if method == "strict" else FLEXIBLE.findall(text)
    return normalize_number(found[-1]) if found else None


def normalize_number(text: str) -> str:
    """Remove thousands separators, the dollar sign and a final period: `$1,234.` becomes `1234`."""
    return text.strip().replace(",", "").replace("$", "").rstrip(".")


def compute_score(
    text: str,
    ground_truth: object,
    *,
    method: Literal["strict", "flexible"] = "strict",
    format_score: float = 0.0,
) -> float:
    """Return 1 for the correct number, `format_score` for a wrong one, 0 without a number.

    Args:
        ground_truth: a number, or its text; 72 and 72.0 are the same.

    Raises:
        ValueError: the ground truth is missing.
    """
    if isinstance(ground_truth, str):
        ground_truth = normalize_number(ground_truth)
    answer = extract_answer(text, method)
    correct = same_number(answer or "", ground_truth)
    if answer is None:
        return 0.0
    return 1.0 if correct else format_score


def score(task: Task, text: str, trajectory: Trajectory) -> dict[str, float | str]:
    """Score the last assistant turn, and add the step rewards of the checking tool.

    Args:
        text: the last assistant turn, decoded.

    Returns:
        `correct`: 1 or 0, by the strict form. `score`: the same, less 0.05 for each check that did
        not improve on the best so far. `answer`: the number that was read, for maj@n.
    """
    correct = compute_score(text, task.ground_truth)
    checks = math.fsum(step.value for step in trajectory.step_rewards if step.name == TOOL)
    return {"score": correct + checks, "correct": correct, "answer": extract_answer(text) or ""}
