"""Admission of work: which group may start when, and handing finished groups on in order.

Group g belongs to training step g // batch_size, always. It may start once the server serves version
`step - max_staleness` or newer; it is trained at version `step`. So no token can be more than `max_staleness` versions
behind, nothing has to be thrown away to keep the bound, and which rows a step holds does not depend on timing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agentloop.config import RolloutConfig, SamplingConfig
from agentloop.types import Task, Trajectory


class RunsEpisodes(Protocol):
    """The part of `agentloop.runner.EpisodeRunner` that a producer needs. It returns failures, it raises none."""

    async def run(
        self, task: Task, *, group_id: str, sample_index: int, sampling: SamplingConfig, seed: int | None
    ) -> list[Trajectory]: ...


class PicksRows(Protocol):
    """Which row a group works on: a pure function of the group's index, so that a resumed run picks the same."""

    def __getitem__(self, index: int) -> int: ...


@dataclass(slots=True)
class Group:
    """`group_size` episodes of one prompt. An episode is a list of trajectories: more than one after a fork."""

    index: int
    task: Task
    episodes: list[list[Trajectory]]
    started_s: float = field(default_factory=time.perf_counter)
    finished_s: float = 0.0

    @property
    def trajectories(self) -> list[Trajectory]:
        return [trajectory for episode in self.episodes for trajectory in episode]


class Producer:
    """Runs the groups of a training run as the policy version allows.

    Args:
        tasks: the training rows.
        rows: row of a group, by the group's index.
        total_steps: no group beyond it is admitted.
        first_step: where a resumed run goes on.
        on_episode: called whenever an episode has ended, with its trajectories.
    """

    def __init__(
        self,
        runner: RunsEpisodes,
        tasks: Sequence[Task],
        rows: PicksRows,
        config: RolloutConfig,
        *,
        seed: int,
        total_steps: int,
        first_step: int = 0,
        on_episode: Callable[[list[Trajectory]], None] = lambda _: None,
    ) -> None:
        self._runner = runner
        self._tasks = tasks
        self._rows = rows
        self._config = config
        self._seed = seed
        self._total_groups = total_steps * config.batch_size
        self._next = first_step * config.batch_size
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._on_episode = on_episode
        self._running: dict[int, asyncio.Task[Group]] = {}

    def admit(self, version: int) -> None:
        """Start every group that may start now that the server serves `version`."""
        limit = min(self._total_groups, (version + self._config.max_staleness + 1) * self._config.batch_size)
        while self._next < limit:
            index = self._next
            self._running[index] = asyncio.create_task(self._group(index), name=f"group {index}")
            self._next += 1

    async def take(self, index: int) -> Group:
        """Wait for group `index` and hand it over; each group can be taken once."""
        group = await self._running[index]
        del self._running[index]
        return group

    async def close(self) -> None:
        """Cancel what still runs; tools are closed by their episodes."""
        tasks = list(self._running.values())
        self._running.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _group(self, index: int) -> Group:
        task = self._tasks[self._rows[index]]
        group = Group(index, task, [])
        # Slots are taken in the order of the groups (the semaphore is first come, first served), so that the groups
        # which the trainer wants first also finish first.
        episodes = [
            asyncio.create_task(self._episode(task, f"g{index}", sample), name=f"group {index} sample {sample}")
            for sample in range(self._config.group_size)
        ]
        try:
            group.episodes = list(await asyncio.gather(*episodes))
        finally:
            for episode in episodes:
                episode.cancel()
        group.finished_s = time.perf_counter()
        return group

    async def _episode(self, task: Task, group_id: str, sample: int) -> list[Trajectory]:
        async with self._slots:
            trajectories = await self._runner.run(
                task, group_id=group_id, sample_index=sample, sampling=self._config.sampling, seed=self._seed
            )
        self._on_episode(trajectories)
        return trajectories
