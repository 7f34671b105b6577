"""gsm8k: is the number after the last `####` the right one?"""

from __future__ import annotations

import re
from typing import Literal

from agentloop.types import Task, Trajectory

STRICT = re.compile(r"#### (-?[0-9.,]+)")
FLEXIBLE = re.compile(r"-?[0-9][0-9.,]*|-?\.[0-9]+")
TAIL_CHARACTERS = 300
"""Where the strict form looks: a long text cannot hide many guesses, and a regular expression stays cheap."""


def extract_answer(text: str, method: Literal["strict", "flexible"] = "strict") -> str | None:
    """The answer in a solution: after the last `#### ` (strict), or the last number at all (flexible)."""
    found = STRICT.findall(text[-TAIL_CHARACTERS:]) if method == "strict" else FLEXIBLE.findall(text)
    return normalize_number(found[-1]) if found else None


def normalize_number(text: str) -> str:
    """`$1,234.` and `1234` are the same number."""
    return text.strip().replace(",", "").replace("$", "").rstrip(".")


def compute_score(
    text: str,
    ground_truth: str,
    *,
    method: Literal["strict", "flexible"] = "strict",
    format_score: float = 0.0,
) -> float:
    """1 for the right number, `format_score` for a wrong one, 0 for none."""
    answer = extract_answer(text, method)
    if answer is None:
        return 0.0
    return 1.0 if answer == normalize_number(str(ground_truth)) else format_score


def score(task: Task, text: str, trajectory: Trajectory) -> dict[str, float | str]:
    """The reward of the gsm8k recipe: strict, 1 or 0; and the number that it read, for maj@n."""
    return {"score": compute_score(text, str(task.ground_truth)), "answer": extract_answer(text) or ""}
