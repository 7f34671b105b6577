"""The samples of one group side by side, and one task over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, takewhile
from typing import Any

from agentloop.errors import TraceError
from agentloop.text import mean
from agentloop.viewer.api.conversation import Columns, conversation
from agentloop.viewer.api.run import Run
from agentloop.web.refusals import Refusal

MOST_SAMPLES = 64
"""Samples of a group whose conversations are in an answer."""

MOST_OF_TASK = 5_000
"""Episodes of a task in an answer."""


def group_json(run: Run, step: int, split: str, group_id: str) -> dict[str, Any]:
    """Return the samples of a group: their rows, conversations, and the advantage that each got.

    Raises:
        Refusal: there is no such group.
    """
    rows = run.index().group(step, split, group_id)
    if not rows:
        raise Refusal(404, f"step {step} has no {split} group {group_id!r}")
    samples, problems = [], []
    for row in rows[:MOST_SAMPLES]:
        sample: dict[str, Any] = {**row, "conversation": []}
        try:
            record = run.trajectory(row["key"])
        except TraceError as exc:
            problems.append({"file": row["key"], "problem": exc.message})
        else:
            sample["conversation"] = conversation(Columns(record))
        samples.append(sample)
    rewards = [row["reward"] for row in rows]
    return {
        "step": step,
        "split": split,
        "group_id": group_id,
        "task_id": rows[0]["task_id"],
        "total": len(rows),
        "reward_mean": mean(rewards),
        "prompt": _prompt(samples),
        "samples": samples,
        "problems": problems,
    }


def task_json(run: Run, task_id: str) -> dict[str, Any]:
    """Return the episodes of a task by step, with mean, least and greatest reward of each step.

    Raises:
        Refusal: there is no episode of it.
    """
    rows = run.index().task(task_id, MOST_OF_TASK)
    if not rows:
        raise Refusal(404, f"no episode of this run has the task {task_id!r}")
    points = []
    for (step, split), same in groupby(rows, lambda row: (row["step"], row["split"])):
        members = list(same)
        rewards = [row["reward"] for row in members if row["reward"] is not None]
        points.append(
            {
                "step": step,
                "split": split,
                "version": members[0]["version"],
                "count": len(members),
                "reward_mean": mean(rewards),
                "reward_min": min(rewards, default=None),
                "reward_max": max(rewards, default=None),
                "length_mean": mean(row["length"] for row in members),
                "samples": members,
            }
        )
    return {"task_id": task_id, "prompt": _prompt_of(run, rows[-1]), "total": len(rows), "steps": points}


def _prompt(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages before the first sampled one."""
    messages: list[dict[str, Any]] = next((sample["conversation"] for sample in samples if sample["conversation"]), [])
    return list(takewhile(lambda message: message["turn"] is None, messages))


def _prompt_of(run: Run, row: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        return _prompt([{"conversation": conversation(Columns(run.trajectory(row["key"])))}])
    except TraceError:
        return []
