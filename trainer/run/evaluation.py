"""Evaluation on `data.val`: the same agent loops, their own sampling, between training steps or beside them.

An evaluation between steps measures one version. One in the background goes on while the trainer publishes: its
episodes, and within an episode its turns, may come from several versions. Its number is that of none of them; which
ones it spans is written beside it, and it stands at the step where it began.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from agentloop.config import Recipe, SamplingConfig
from agentloop.errors import RunError
from agentloop.types import EpisodeStatus, Task, Trajectory
from trainer.console.console import Console
from trainer.rollouts.producer import RunsEpisodes
from trainer.run.episode_metrics import failure_causes
from trainer.run.eval_metrics import Outcome, eval_metrics
from trainer.run.rundir import RunDir

SAID_EVERY_S = 30.0
"""Seconds between two words on a background evaluation; the bar is the training's."""

BACKGROUND_SHARE = 4
"""A background evaluation has one in so many of the episodes in flight, unless the recipe says how many."""

OnEpisode = Callable[[int, int, list[Trajectory]], None]
"""Told of each finished episode: row, sample, trajectories."""


async def run_episodes(
    runner: RunsEpisodes,
    tasks: Sequence[Task],
    *,
    n: int,
    sampling: SamplingConfig,
    seed: int,
    max_concurrent: int,
    on_episode: OnEpisode,
) -> None:
    """Run `n` episodes of every task; at most `max_concurrent` exist at one time, and none is kept."""

    def episodes() -> Iterator[tuple[int, Task, int]]:
        for row, task in enumerate(tasks):
            for sample in range(n):
                yield row, task, sample

    waiting = episodes()

    async def work() -> None:
        for row, task, sample in waiting:
            trajectories = await runner.run(task, group_id=f"e{row}", sample_index=sample, sampling=sampling, seed=seed)
            on_episode(row, sample, trajectories)

    workers = [asyncio.create_task(work()) for _ in range(min(max_concurrent, len(tasks) * n))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


class Evaluation:
    """The evaluations of a run.

    Args:
        runner: gives what runs episodes; asked when an evaluation begins.
        tasks: the validation rows.
        total_steps: of the run; the last step is evaluated whenever any is.
        record: called with the line of an evaluation that is not part of a step's own.

    Attributes:
        rewards: mean reward of every evaluation that has ended, in the order in which they began.
    """

    def __init__(
        self,
        recipe: Recipe,
        runner: Callable[[], RunsEpisodes],
        tasks: Sequence[Task],
        run_dir: RunDir,
        console: Console,
        *,
        total_steps: int,
        record: Callable[[dict[str, Any]], None],
    ) -> None:
        self._recipe = recipe
        self._config = recipe.eval
        self._runner = runner
        self._tasks = tasks
        self._dir = run_dir
        self._console = console
        self._total_steps = total_steps
        self._record = record
        self._running: asyncio.Task[dict[str, Any]] | None = None
        self.rewards: list[float] = []

    @property
    def connections(self) -> int:
        """Requests that training and evaluation have in flight at most."""
        training = self._recipe.rollout.max_concurrent
        if self._config.background:
            return training + self._at_once(background=True)
        return max(training, self._at_once(background=False))

    def _at_once(self, background: bool) -> int:
        training = self._recipe.rollout.max_concurrent
        return self._config.max_concurrent or (max(1, training // BACKGROUND_SHARE) if background else training)

    def due(self, step: int) -> bool:
        """Whether the version that this step makes is to be evaluated."""
        every = self._config.every
        return bool(self._tasks) and every is not None and (step % every == 0 or step == self._total_steps)

    def due_first(self, step: int) -> bool:
        """Whether to evaluate before training begins, or goes on from this step."""
        return bool(self._tasks) and (self._config.only or (step == 0 and self._config.before_train))

    async def before(self, step: int, version: int) -> None:
        """Do what is due before training begins, or goes on from `step`.

        Raises:
            RunError: as `at`.
        """
        if self.due_first(step):
            metrics = await self.at(step, version)
            if metrics:
                self._record(metrics)
                self._console.eval(metrics)
        elif step and self._config.background and self.due(step):
            # A killed run may have begun it, and its checkpoint came before its end.
            done = {row["step"] for row in self._dir.read_metrics() if "eval/reward_mean" in row}
            if step not in done:
                await self.at(step, version)

    async def at(self, step: int, version: int) -> dict[str, Any]:
        """Evaluate the version of a step that is due.

        Returns:
            The numbers; empty when they come later, from an evaluation that has now begun in the background.

        Raises:
            RunError: too many episodes failed.
        """
        if not self._config.background or self._config.only:
            return await self.measure(step, version)
        await self.settle(wait=True)
        work = self.measure(step, version, background=True)
        self._running = asyncio.create_task(work, name=f"evaluation of step {step}")
        return {}

    async def settle(self, *, wait: bool) -> None:
        """Write the line of a background evaluation that has ended.

        Args:
            wait: for one that still runs.

        Raises:
            RunError: as `at`.
        """
        running = self._running
        if running is None or not (wait or running.done()):
            return
        metrics = await running
        self._running = None
        self._record(metrics)
        self._console.eval(metrics)

    async def close(self) -> None:
        """Give up a background evaluation that still runs."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None

    async def measure(self, step: int, version: int, *, background: bool = False) -> dict[str, Any]:
        """Run an evaluation to its end; its numbers, under `step`, with the version that it began with.

        Raises:
            RunError: as `at`.
        """
        config = self._config
        begin = said = time.perf_counter()
        total = len(self._tasks) * config.n
        outcomes: list[Outcome] = []
        logged: dict[int, list[Trajectory]] = {}
        unhealthy: list[Trajectory] = []
        oldest = newest = version

        def on_episode(row: int, sample: int, episode: list[Trajectory]) -> None:
            nonlocal oldest, newest, said
            outcomes.append(Outcome.of(row, episode))
            number = row * config.n + sample
            if number < config.log_generations:
                logged[number] = episode
            if episode[-1].status is not EpisodeStatus.OK and len(unhealthy) < 100:
                unhealthy.append(episode[-1])
            for trajectory in episode:
                versions = set(trajectory.versions) - {None}
                oldest = min(oldest, *versions) if versions else oldest  # type: ignore[type-var]
                newest = max(newest, *versions) if versions else newest  # type: ignore[type-var]
            if not background:
                self._console.progress(len(outcomes), total, "evaluation")
            elif time.perf_counter() - said >= SAID_EVERY_S:
                said = time.perf_counter()
                self._console.notice(f"evaluation of step {step}: {len(outcomes):,}/{total:,} episodes")

        await run_episodes(
            self._runner(),
            self._tasks,
            n=config.n,
            sampling=config.sampling,
            seed=self._recipe.seed_for("rollout"),
            max_concurrent=self._at_once(background),
            on_episode=on_episode,
        )
        took = time.perf_counter() - begin
        numbers = await asyncio.to_thread(eval_metrics, outcomes, config.n, config.pass_reward)
        metrics = {"step": step, "version": version, **numbers}
        metrics |= {"eval/version_min": oldest, "eval/version_max": newest}
        # Not `time_s` in the background: that is time which the run spends on evaluation alone.
        metrics["eval/background_s" if background else "eval/time_s"] = took
        if metrics["eval/failed"] > self._recipe.run.max_failed_fraction * max(1, metrics["eval/episodes"]):
            causes = "\n  - ".join(failure_causes(unhealthy))
            raise RunError(
                f"{metrics['eval/failed']} of {total} episodes of an evaluation failed. First causes:\n  - {causes}",
                "mend the cause; run.max_failed_fraction sets the bound",
            )
        if logged:
            kept = [trajectory for number in sorted(logged) for trajectory in logged[number]]
            await asyncio.to_thread(self._dir.write_trace, step, "eval", kept[: config.log_generations])
        if metrics["eval/reward_mean"] is not None:
            self.rewards.append(metrics["eval/reward_mean"])
        return metrics
