r"""Reward of ReTool: +1 if the `\boxed{}` answer at the end of the text is correct, else -1.

The recipe from which this one comes pays 0.1 for each tool call of a wrong answer. It is here as
`score_original`, and teaches a policy to call tools until its turns run out
(tests/recipes/retool/test_bonus.py); `score` and `score_capped` are its safe replacements.
"""

from __future__ import annotations

from agentloop.reward.mathematics import boxed_correct, boxed_vote
from agentloop.types import Task, Trajectory
from trainer.algorithms.shaping import wrong_answer

RIGHT, WRONG = 1.0, -1.0

TAIL_CHARACTERS = 300
"""Only this many characters at the end of the text are searched: a long text cannot hide many
guesses, and its length costs nothing."""

CALL_BONUS = 0.1
CAP = -0.6


def score(task: Task, text: str, trajectory: Trajectory) -> dict[str, float | str]:
    """Score the last assistant turn: +1 or -1, for any number of calls.

    Runs in a process (`run_in: process`): see `agentloop.reward.mathematics`.

    Args:
        text: the last assistant turn, decoded; what a tool printed is not in it.

    Returns:
        `score`: +1 or -1. `correct`: 1 or 0. `answer`: the answer that was read, for maj@n.
    """
    return _scored(task, text, trajectory, bonus=0.0, cap=None)


def score_capped(task: Task, text: str, trajectory: Trajectory) -> dict[str, float | str]:
    """Score a wrong answer by `min(-0.6, -1 + 0.1 * calls)`; a right one is always worth more."""
    return _scored(task, text, trajectory, bonus=CALL_BONUS, cap=CAP)


def score_original(task: Task, text: str, trajectory: Trajectory) -> dict[str, float | str]:
    """Score a wrong answer by `min(0, -1 + (turns - 2) / 2 * 0.1)`; not safe to train on.

    `turns` are messages, the prompt included: `(turns - 2) / 2` is the number of answered calls.
    """
    return _scored(task, text, trajectory, bonus=CALL_BONUS, cap=None)


def _scored(
    task: Task, text: str, trajectory: Trajectory, *, bonus: float, cap: float | None
) -> dict[str, float | str]:
    tail = text[-TAIL_CHARACTERS:]
    right = boxed_correct(tail, task.ground_truth)
    value = RIGHT if right else wrong_answer(len(trajectory.turns), WRONG, bonus, cap)
    return {"score": value, "correct": float(right), "answer": boxed_vote(tail)}
