"""Choose trajectories for the page: representative ones by a fixed rule, and comparable pairs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from agentloop.report.reading import Traced
from agentloop.text import clean

TYPICAL = 3
"""Trajectories that represent a step: one from each third of its rewards."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Failed or rejected trajectories with the same cause."""

    status: str
    reason: str
    count: int
    first_step: int
    last_step: int
    tasks: int


def typical(trajectories: Sequence[Traced], count: int = TYPICAL) -> list[Traced]:
    """Choose up to `count` scored trajectories at fixed reward ranks, preferring distinct tasks."""
    ranked = _ranked(trajectories)
    left = dict(enumerate(ranked))
    chosen: list[Traced] = []
    for index in range(min(count, len(ranked))):
        target = (1 - (index + 0.5) / count) * (len(ranked) - 1)
        tasks = {traced.task_id for traced in chosen}
        best = min(left, key=lambda i: (left[i].task_id in tasks, abs(i - target)))
        chosen.append(left.pop(best))
    return chosen


def pairs(first: Sequence[Traced], last: Sequence[Traced]) -> list[tuple[Traced | None, Traced | None]]:
    """Pair typical trajectories of one step with their best matches of another.

    The best match has the same task if the other step saw it; else a similar rank of reward (within
    a twelfth), and then the prompt that shares most tokens.
    """
    left = typical(first)
    ranked_first, ranked = _ranked(first), _ranked(last)
    out: list[tuple[Traced | None, Traced | None]] = []
    taken: set[int] = set()
    for traced in left:
        rank = _rank(ranked_first, traced)
        words = Counter(traced.token_ids[: traced.prompt_length])
        best = min(
            (i for i in range(len(ranked)) if i not in taken),
            key=lambda i: (
                ranked[i].task_id != traced.task_id,
                max(0.0, abs(_position(ranked, i) - rank) - 1 / 12),
                -(words & Counter(ranked[i].token_ids[: ranked[i].prompt_length])).total(),
            ),
            default=None,
        )
        if best is not None:
            taken.add(best)

        out.append((traced, ranked[best] if best is not None else None))
    return out


def same_tasks(
    first: Sequence[Traced], last: Sequence[Traced], count: int
) -> list[tuple[Traced | None, Traced | None]]:
    """Pair the same tasks of two evaluations, in the order of the later one."""
    earlier: dict[str, Traced] = {}
    for traced in first:
        earlier.setdefault(traced.task_id, traced)
    return [(earlier.get(traced.task_id), traced) for traced in last[:count]]


def spread(steps: Sequence[int], count: int) -> list[int]:
    """Choose up to `count` evenly spaced steps between the first and the last, excluding both."""
    inner = list(steps[1:-1])
    if len(inner) <= count:
        return inner
    return [inner[round((index + 0.5) * len(inner) / count - 0.5)] for index in range(count)]


def failures(unhealthy: Sequence[Traced], limit: int = 20) -> list[Failure]:
    """Group by cause, most frequent first. Reasons that differ only in numbers are one cause."""
    groups: dict[tuple[str, str], list[Traced]] = {}
    for traced in unhealthy:
        reason = traced.error or "no reason recorded"
        groups.setdefault((traced.status, re.sub(r"\d+", "#", reason)), []).append(traced)
    found = [
        Failure(
            status=clean(status, 20),
            reason=clean(members[0].error or "no reason recorded", 400),
            count=len(members),
            first_step=min(member.step for member in members),
            last_step=max(member.step for member in members),
            tasks=len({member.task_id for member in members}),
        )
        for (status, _), members in groups.items()
    ]
    return sorted(found, key=lambda failure: -failure.count)[:limit]


def _ranked(trajectories: Sequence[Traced]) -> list[Traced]:
    """Sort from the lowest to the highest reward; failed trajectories have none and are omitted."""
    return sorted((t for t in trajectories if t.reward is not None and t.token_ids), key=lambda t: t.reward or 0.0)


def _position(ranked: Sequence[Traced], index: int) -> float:
    return index / max(1, len(ranked) - 1)


def _rank(ranked: Sequence[Traced], traced: Traced) -> float:
    return _position(ranked, next(i for i, other in enumerate(ranked) if other is traced))
