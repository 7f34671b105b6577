"""Score stored episodes again, without generation.

A reward function is called as in the run: with the row's task, the text of the last turn, and the
trajectory as it was before it was scored. So the run's own function returns the stored rewards, to
the bit, if it depends on nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from agentloop.errors import AgentloopError, RewardError
from agentloop.reward.calling import call_reward
from agentloop.reward.loading import RewardFunction
from agentloop.trace.record import TraceRecord
from agentloop.types import EpisodeStatus, Message, Task, Trajectory

AT_ONCE = 64
"""Episodes that are scored at the same time."""

AFTER_SCORING = ("reward_s",)
"""Metrics that an episode gets after its reward."""

FAILED_REWARD = "the reward "
"""Beginning of the error of an episode that failed because its reward did."""


@dataclass(frozen=True, slots=True)
class Rescored:
    """One episode with its old and its new reward.

    Attributes:
        old: None if the episode failed because its reward did.
        new: None if the function failed; `error` says how.
        old_parts: of the names that are in `new_parts`.
        moved: the conversation does not begin with the row's prompt: the rows may have changed.
    """

    key: str
    task_id: str
    old: float | None
    new: float | None = None
    old_parts: dict[str, float] = field(default_factory=dict)
    new_parts: dict[str, float] = field(default_factory=dict)
    old_answer: str | None = None
    new_answer: str | None = None
    error: str | None = None
    moved: bool = False

    @property
    def changed(self) -> bool:
        """Whether the reward is another number, to the bit."""
        return self.old != self.new

    @property
    def difference(self) -> float:
        """The new reward minus the old one; 0 if either is unknown."""
        return 0.0 if self.old is None or self.new is None else self.new - self.old


class TaskFinder:
    """Find the task of a stored episode among a split's tasks.

    The number of its row is tried first, then its `task_id`. Among several rows of one id, the one
    whose prompt begins the conversation is taken.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        self._places: dict[str, list[int]] | None = None

    def find(self, record: TraceRecord) -> tuple[Task, bool] | None:
        """Return the task, and whether its prompt begins the conversation; None: no row has its
        id."""
        t = record.trajectory
        if record.row is not None and 0 <= record.row < len(self._tasks):
            task = self._tasks[record.row]
            if task.task_id == t.task_id and begins_with(t.messages, task.prompt):
                return task, True

        if self._places is None:
            self._places = {}
            for place, task in enumerate(self._tasks):
                self._places.setdefault(task.task_id, []).append(place)
        candidates = [self._tasks[place] for place in self._places.get(t.task_id, ())]
        same = next((task for task in candidates if begins_with(t.messages, task.prompt)), None)
        if same is not None:
            return same, True
        return (candidates[0], False) if candidates else None


def begins_with(messages: Sequence[Message], prompt: Sequence[Message]) -> bool:
    """Whether a conversation begins with a prompt: roles and texts; images are not compared."""
    return len(messages) >= len(prompt) and all(
        seen["role"] == asked["role"] and _text(seen) == _text(asked)
        for seen, asked in zip(messages, prompt, strict=False)
    )


def _text(message: Message) -> str:
    content: Any = message.get("content")
    if not isinstance(content, list):
        return str(content or "")
    return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))


def can_be_scored(record: TraceRecord) -> bool:
    """Whether an episode was scored, or failed only because its reward did."""
    t = record.trajectory
    if t.status is EpisodeStatus.OK:
        return True
    return t.status is EpisodeStatus.FAILED and bool(t.turns) and str(t.error or "").startswith(FAILED_REWARD)


def unscored(trajectory: Trajectory) -> Trajectory:
    """Return a trajectory as the reward function saw it: without its outcome."""
    return replace(
        trajectory,
        status=EpisodeStatus.OK,
        reward=None,
        reward_parts={},
        outcome=None,
        answer=None,
        error=None,
        broken_rule=None,
        faults=[],
        spans=[],
        metrics={name: value for name, value in trajectory.metrics.items() if name not in AFTER_SCORING},
    )


async def rescore(
    records: Iterable[TraceRecord], finder: TaskFinder, function: RewardFunction, timeout_s: float
) -> AsyncIterator[Rescored]:
    """Score main trajectories again; yield them in their order.

    An exception of the function, or a row that is not found, is the `error` of its episode.
    """
    waiting = iter(records)
    while batch := await asyncio.to_thread(_take, waiting):
        for done in await asyncio.gather(*(_rescored(record, finder, function, timeout_s) for record in batch)):
            yield done


def _take(records: Iterator[TraceRecord]) -> list[TraceRecord]:
    return list(islice(records, AT_ONCE))


async def _rescored(record: TraceRecord, finder: TaskFinder, function: RewardFunction, timeout_s: float) -> Rescored:
    t = record.trajectory
    before = Rescored(record.key, t.task_id, t.reward, old_answer=t.answer)
    try:
        found = finder.find(record)
    except AgentloopError as exc:  # a row that cannot be read
        return replace(before, error=exc.message)
    if found is None:
        return replace(before, error=f"no row has the task_id {t.task_id!r}")
    task, same = found
    try:
        verdict = await call_reward(function, task, unscored(t), timeout_s)
    except RewardError as exc:
        return replace(before, error=exc.message, moved=not same)
    return replace(
        before,
        new=verdict.score,
        old_parts={name: t.reward_parts[name] for name in verdict.parts if name in t.reward_parts},
        new_parts=verdict.parts,
        new_answer=verdict.answer,
        moved=not same,
    )
