r"""Reward of geometry3k: 0.9 for a correct `\boxed{}` answer, 0.1 for the form of the text."""

from __future__ import annotations

import math

from agentloop.reward.boxed import last_boxed
from agentloop.reward.mathematics import boxed_correct, boxed_vote, same_answer
from agentloop.types import Task, Trajectory

FORMAT_SHARE = 0.1


def accuracy(text: str, ground_truth: object) -> float:
    r"""Return 1 if the last `\boxed{}` answer of a text has the value of the ground truth, else 0.

    Raises:
        ValueError: the ground truth is missing.
    """
    return float(boxed_correct(text, ground_truth))


def has_format(text: str) -> bool:
    r"""Whether a whole text is `<think> ... </think> ... \boxed{ ... } ...`.

    The same as `re.fullmatch(r"<think>.*</think>.*\\boxed\{.*\}.*", text, re.DOTALL)`, in linear
    time, with white space allowed in front.
    """
    text = text.lstrip()
    if not text.startswith("<think>"):
        return False
    thought = text.find("</think>", len("<think>"))
    box = text.find("\\boxed{", thought + len("</think>")) if thought >= 0 else -1
    return box >= 0 and text.find("}", box) >= 0


def compute_score(text: str, ground_truth: object) -> float:
    """Return 0.9 for the correct answer plus 0.1 for the form."""
    return (1 - FORMAT_SHARE) * accuracy(text, ground_truth) + FORMAT_SHARE * has_format(text)


def score(task: Task, text: str, trajectory: Trajectory) -> dict[str, float | str]:
    """Score the last assistant turn. Runs in a process (`run_in: process`): see `same_answer`.

    Args:
        text: the last assistant turn; reasoning that the chat format took out of it is put back.

    Returns:
        `score`: 0 to 1, plus the step rewards of the tool. `accuracy` and `format`: 0 or 1.
        `answer`: the answer that was read, for maj@n.
    """
    reasoning = trajectory.turns[-1].reasoning if trajectory.turns else None
    whole = text if reasoning is None else f"<think>{reasoning}</think>{text}"
    correct, formed = accuracy(whole, task.ground_truth), float(has_format(whole))
    idle = math.fsum(step.value for step in trajectory.step_rewards)
    return {
        "score": (1 - FORMAT_SHARE) * correct + FORMAT_SHARE * formed + idle,
        "accuracy": correct,
        "format": formed,
        "answer": boxed_vote(whole),
    }


def check(answer: str, ground_truth: str) -> str:
    """Return the tool's verdict, `1` or `0`.

    Args:
        answer: with or without its box.
        ground_truth: the answer to compare with.
    """
    boxed = last_boxed(answer)
    return f"{float(same_answer(answer if boxed is None else boxed, ground_truth)):g}"
