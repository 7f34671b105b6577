"""Run the groups of a training run: admit each when the policy version allows, return all in order.

Group g always belongs to training step g // batch_size. It may start once the server serves version
`step - max_staleness` or newer, and it is trained at version `step`. So no token is more than
`max_staleness` versions behind, no group is discarded to keep that bound, and the rows of a step
never depend on timing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agentloop.config import RolloutConfig, SamplingConfig
from agentloop.errors import RunDirError
from agentloop.types import EpisodeStatus, Task, Trajectory
from trainer.algorithms.dynamic_sampling import replacement, teaches_nothing


class RunsEpisodes(Protocol):
    """The part of an `EpisodeRunner` that a producer uses. Failures are returned, not raised."""

    async def run(
        self, task: Task, *, group_id: str, sample_index: int, sampling: SamplingConfig, seed: int | None
    ) -> list[Trajectory]: ...


class PicksRows(Protocol):
    """Map a group's index to its row. A pure function: a resumed run picks the same rows."""

    def __getitem__(self, index: int) -> int: ...


@dataclass(slots=True)
class Group:
    """`group_size` episodes of one prompt. An episode is a list of trajectories: more than one
    after a fork.

    Attributes:
        baseline: the greedily decoded episode of the prompt, which is not trained; empty if the
            algorithm has none.
        replaced: how often dynamic sampling replaced a prompt without a learning signal.
        given_up: the last replacement has no learning signal either.
    """

    index: int
    task: Task
    episodes: list[list[Trajectory]]
    baseline: list[Trajectory] = field(default_factory=list)
    replaced: int = 0
    given_up: bool = False
    started_s: float = field(default_factory=time.perf_counter)
    finished_s: float = 0.0

    @property
    def trajectories(self) -> list[Trajectory]:
        return [trajectory for episode in self.episodes for trajectory in episode]


class Producer:
    """Run the groups of a training run as the policy version allows.

    Args:
        tasks: the training rows.
        rows: the row of a group, by the group's index.
        total_steps: groups of later steps are never admitted.
        first_step: completed steps of a resumed run.
        on_episode: called with the trajectories of each episode as it ends.
        replacements: how often to replace a group whose rewards are all equal
            (`algorithms.dynamic_sampling`).
        greedy_baseline: add one episode at temperature 0 to each group (ReMax).
        step_rewards: for replacements, compare step rewards too.
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
        replacements: int = 0,
        greedy_baseline: bool = False,
        step_rewards: bool = False,
    ) -> None:
        self._replacements = replacements
        self._greedy_baseline = greedy_baseline
        self._step_rewards = step_rewards
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
        self._restored: dict[int, Group] = {}
        self._active = 0
        self._idle_s, self._idle_since = 0.0, time.perf_counter()
        self._taken: dict[int, Group] = {}  # groups of the step in training: a checkpoint still needs them

    def admit(self, version: int) -> None:
        """Start every group allowed to start once the server serves `version`."""
        done = version * self._config.batch_size  # steps before `version` are trained
        self._taken = {index: group for index, group in self._taken.items() if index >= done}
        limit = min(self._total_groups, (version + self._config.max_staleness + 1) * self._config.batch_size)
        while self._next < limit:
            index = self._next
            self._running[index] = asyncio.create_task(self._group(index), name=f"group {index}")
            self._next += 1

    async def wait(self, indices: Iterable[int]) -> None:
        """Wait until groups have finished. An exception of one is raised when it is taken."""
        running = [self._running[index] for index in indices]
        if running:
            await asyncio.wait(running)

    async def take(self, index: int) -> Group:
        """Wait for group `index` and return it. Each group can be taken once."""
        group = await self._running[index]
        del self._running[index]
        self._taken[index] = group
        return group

    @property
    def idle_s(self) -> float:
        """Seconds so far in which no group ran, because all that may run were finished."""
        return self._idle_s + (0.0 if self._active else time.perf_counter() - self._idle_since)

    def state(self) -> list[Group]:
        """Return the groups to store in a checkpoint: finished but not trained yet, by index.

        Running groups are not included: tools and open connections cannot be saved, so a resumed
        run starts them again.
        """
        ready = [task for task in self._running.values() if task.done() and not task.cancelled()]
        finished = [*self._taken.values(), *(task.result() for task in ready if task.exception() is None)]
        return sorted(finished, key=lambda group: group.index)

    def restore(self, groups: Sequence[Group]) -> None:
        """Reuse the groups of a checkpoint's `state`. Call it before the first `admit`.

        Raises:
            RunDirError: a group has another size, is too stale, or lacks the greedy episode that
                the algorithm needs.
        """
        for group in groups:
            self._check(group)
            # The clock restarted with the process: keep the duration, and let it end now.
            now = time.perf_counter()
            group.started_s, group.finished_s = now - (group.finished_s - group.started_s), now
            self._restored[group.index] = group

    def _check(self, group: Group) -> None:
        step = group.index // self._config.batch_size
        versions = [v for trajectory in group.trajectories if (v := trajectory.min_version) is not None]
        staleness = step - min(versions, default=step)

        fault = None
        if len(group.episodes) != self._config.group_size:
            fault, key = f"has {len(group.episodes)} episodes", "rollout.group_size"
        elif staleness > self._config.max_staleness:
            fault, key = f"would be trained {staleness} versions behind", "rollout.max_staleness"
        elif self._greedy_baseline and not group.baseline:
            fault, key = "has no greedy episode", "trainer.algorithm.advantage"
        if fault is not None:
            raise RunDirError(
                f"group {group.index} of the checkpoint {fault}",
                f"restore the earlier {key}, or delete the checkpoint's groups file to sample its groups again",
            )

    async def close(self) -> None:
        """Cancel running groups; their episodes close their tools."""
        tasks = list(self._running.values())
        self._running.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _group(self, index: int) -> Group:
        """Run group `index`; if it has no learning signal, run a replacement in its place."""
        if (restored := self._restored.pop(index, None)) is not None:
            return restored

        begin = time.perf_counter()
        if not self._active:
            self._idle_s += begin - self._idle_since
        self._active += 1
        try:
            return await self._attempts(index, begin)
        finally:
            self._active -= 1
            self._idle_since = time.perf_counter()

    async def _attempts(self, index: int, begin: float) -> Group:
        for attempt in range(self._replacements + 1):
            group = await self._attempt(index, attempt)
            group.started_s, group.replaced = begin, attempt
            group.given_up = self._replacements > 0 and teaches_nothing(self._scores(group))
            if not group.given_up:
                break
        return group

    async def _attempt(self, index: int, attempt: int) -> Group:
        task = self._tasks[self._rows[replacement(index, attempt)]]
        group = Group(index, task, [])
        name = f"g{index}.{attempt}" if attempt else f"g{index}"  # seeds derive from the name

        # Tasks are created in group order and the semaphore is fair, so the groups that the trainer
        # takes first also start first.
        sampling = [self._config.sampling] * self._config.group_size
        if self._greedy_baseline:
            sampling.append(self._config.sampling.model_copy(update={"temperature": 0.0}))
        episodes = [
            asyncio.create_task(
                self._episode(task, name, sample, how, counted=not attempt and sample < self._config.group_size),
                name=f"group {index} sample {sample}",
            )
            for sample, how in enumerate(sampling)
        ]
        try:
            finished = list(await asyncio.gather(*episodes))
        finally:
            for episode in episodes:
                episode.cancel()

        group.episodes = finished[: self._config.group_size]
        group.baseline = finished[-1] if self._greedy_baseline else []
        group.finished_s = time.perf_counter()
        return group

    def _scores(self, group: Group) -> list[Hashable]:
        """Return the score of each scored episode, as far as the estimator distinguishes them."""
        return [
            (episode[-1].reward, tuple(s.value for t in episode for s in t.step_rewards) if self._step_rewards else ())
            for episode in group.episodes
            if episode and episode[-1].status is EpisodeStatus.OK and episode[-1].reward is not None
        ]

    async def _episode(
        self, task: Task, group_id: str, sample: int, sampling: SamplingConfig, *, counted: bool
    ) -> list[Trajectory]:
        async with self._slots:
            trajectories = await self._runner.run(
                task, group_id=group_id, sample_index=sample, sampling=sampling, seed=self._seed
            )
        if counted:
            self._on_episode(trajectories)
        return trajectories
