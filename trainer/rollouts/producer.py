"""Admission of work: which group may start when, and handing finished groups on in order.

Group g belongs to training step g // batch_size, always. It may start once the server serves version
`step - max_staleness` or newer; it is trained at version `step`. So no token can be more than `max_staleness` versions
behind, nothing has to be thrown away to keep the bound, and which rows a step holds does not depend on timing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agentloop.config import RolloutConfig, SamplingConfig
from agentloop.errors import RunDirError
from agentloop.types import EpisodeStatus, Task, Trajectory
from trainer.algorithms.dynamic_sampling import replacement, teaches_nothing


class RunsEpisodes(Protocol):
    """The part of `agentloop.agent.runner.EpisodeRunner` that a producer needs. It returns failures, it raises none."""

    async def run(
        self, task: Task, *, group_id: str, sample_index: int, sampling: SamplingConfig, seed: int | None
    ) -> list[Trajectory]: ...


class PicksRows(Protocol):
    """Which row a group works on: a pure function of the group's index, so that a resumed run picks the same."""

    def __getitem__(self, index: int) -> int: ...


@dataclass(slots=True)
class Group:
    """`group_size` episodes of one prompt. An episode is a list of trajectories: more than one after a fork.

    Attributes:
        baseline: the greedily decoded episode of the prompt, which is not trained; empty: none was asked for.
        replaced: how often another prompt took the place of one whose episodes taught nothing.
        given_up: the last of them taught nothing either.
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
    """Runs the groups of a training run as the policy version allows.

    Args:
        tasks: the training rows.
        rows: row of a group, by the group's index.
        total_steps: no group beyond it is admitted.
        first_step: where a resumed run goes on.
        on_episode: called whenever an episode has ended, with its trajectories.
        replacements: how often a group whose rewards are all equal is replaced (`algorithms.dynamic_sampling`).
        greedy_baseline: each group gets one more episode, at temperature 0 (ReMax).
        step_rewards: a group with equal rewards teaches something if its step rewards differ.
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
        self._taken: dict[int, Group] = {}  # of the step that is being trained

    def admit(self, version: int) -> None:
        """Start every group that may start now that the server serves `version`: all steps before it are trained."""
        done = version * self._config.batch_size
        self._taken = {index: group for index, group in self._taken.items() if index >= done}
        limit = min(self._total_groups, (version + self._config.max_staleness + 1) * self._config.batch_size)
        while self._next < limit:
            index = self._next
            self._running[index] = asyncio.create_task(self._group(index), name=f"group {index}")
            self._next += 1

    async def take(self, index: int) -> Group:
        """Wait for group `index` and hand it over; each group can be taken once."""
        group = await self._running[index]
        del self._running[index]
        self._taken[index] = group
        return group

    def state(self) -> list[Group]:
        """The groups that are finished and not trained on, by index: what a checkpoint keeps beside the tensors.

        Groups that still run are not in it. They have no state that could be written down (tools, open connections),
        and a resumed run starts them again.
        """
        ready = [task for task in self._running.values() if task.done() and not task.cancelled()]
        finished = [*self._taken.values(), *(task.result() for task in ready if task.exception() is None)]
        return sorted(finished, key=lambda group: group.index)

    def restore(self, groups: Sequence[Group]) -> None:
        """Take over the groups of a checkpoint's `state`; called before the first `admit`.

        Raises:
            RunDirError: a group is of another size, too stale, or without the greedy episode that is asked for now.
        """
        for group in groups:
            self._check(group)
            # As if it had been sampled just now, in the time that it took.
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
                f"group {group.index}, which the checkpoint holds finished, {fault}",
                f"set {key} as before, or delete the checkpoint's groups.jsonl to sample its groups again",
            )

    async def close(self) -> None:
        """Cancel what still runs; tools are closed by their episodes."""
        tasks = list(self._running.values())
        self._running.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _group(self, index: int) -> Group:
        """Group `index`; where its prompt teaches nothing, that of a replacement, in the same slot."""
        if (restored := self._restored.pop(index, None)) is not None:
            return restored
        begin = time.perf_counter()
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
        name = f"g{index}.{attempt}" if attempt else f"g{index}"  # seeds follow from it: each attempt samples anew
        # Slots are taken in the order of the groups (the semaphore is first come, first served), so that the groups
        # which the trainer wants first also finish first.
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
        """What each scored episode of a group was worth, as the estimator sees it."""
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
