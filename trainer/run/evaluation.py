"""Evaluation on `data.val` with the same agent loops, between training steps or in the background.

An evaluation between steps measures one version. A background evaluation continues while the
trainer publishes, so its episodes, and even the turns of one episode, can come from several
versions. Its result belongs to no single version; the range it spans is written beside it, under
the step at which it began.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from agentloop.config import Recipe, SamplingConfig
from agentloop.errors import RunError
from agentloop.trace.record import TraceRecord
from agentloop.types import EpisodeStatus, Task, Trajectory
from trainer.console.console import Console
from trainer.rollouts.producer import RunsEpisodes
from trainer.run.episode_metrics import AwayTools, failure_causes, failures_text
from trainer.run.eval_metrics import Outcome, eval_metrics
from trainer.run.rundir import RunDir
from trainer.run.traces import RunTraces

PROGRESS_EVERY_S = 30.0
"""Seconds between progress lines of a background evaluation; the bar shows the training."""

BACKGROUND_SHARE = 4
"""Background evaluation has 1 / this of the training's episodes in flight by default."""

OnEpisode = Callable[[int, int, list[Trajectory]], None]
"""Called with each finished episode: row, sample, trajectories."""


def max_in_flight(recipe: Recipe) -> int:
    """Return how many episodes training and evaluation can have in flight together."""
    training, evaluating = recipe.rollout.max_concurrent, _eval_in_flight(recipe, background=recipe.eval.background)
    return training + evaluating if recipe.eval.background else max(training, evaluating)


def _eval_in_flight(recipe: Recipe, *, background: bool) -> int:
    training = recipe.rollout.max_concurrent
    default = max(1, training // BACKGROUND_SHARE) if background else training
    return recipe.eval.max_concurrent or default


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
    """Run `n` episodes of every task, at most `max_concurrent` at a time, without keeping them."""

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


class RecordsMetrics(Protocol):
    """Record metrics as a line of their own, or `amend` the line of their step."""

    def __call__(self, metrics: dict[str, Any], *, amend: bool = False) -> None: ...


class Evaluation:
    """The evaluations of a run.

    Args:
        runner: runs the episodes.
        tasks: the validation rows.
        total_steps: steps of the run; the last one is evaluated if any is.
        record: called with the metrics of an evaluation that are not part of a step's line.
        traces: writes the episodes that are kept.
    """

    def __init__(
        self,
        recipe: Recipe,
        runner: RunsEpisodes,
        tasks: Sequence[Task],
        run_dir: RunDir,
        console: Console,
        *,
        total_steps: int,
        record: RecordsMetrics,
        traces: RunTraces,
    ) -> None:
        self._recipe = recipe
        self._config = recipe.eval
        self._runner = runner
        self._tasks = tasks
        self._dir = run_dir
        self._console = console
        self._total_steps = total_steps
        self._record = record
        self._traces = traces
        self._running: asyncio.Task[dict[str, Any]] | None = None

    def due(self, step: int) -> bool:
        """Return whether to evaluate the version that this step makes."""
        every = self._config.every
        return bool(self._tasks) and every is not None and (step % every == 0 or step == self._total_steps)

    def due_first(self, step: int) -> bool:
        """Return whether to evaluate before training starts at, or continues from, this step."""
        return bool(self._tasks) and (self._config.only or (step == 0 and self._config.before_train))

    async def before(self, step: int, version: int) -> None:
        """Run the evaluation that is due before training starts at, or continues from, `step`.

        Raises:
            RunError: see `at`.
        """
        if self.due_first(step):
            metrics = await self.at(step, version)
            if metrics:
                self._record(metrics)
                self._console.eval(metrics)
        elif step and self.due(step):
            # The run may have ended before the evaluation did, with a checkpoint of its step.
            done = {row["step"] for row in self._dir.read_metrics() if "eval/reward_mean" in row}
            if step not in done and (metrics := await self.at(step, version)):
                self._record(metrics, amend=True)
                self._console.eval(metrics)

    async def at(self, step: int, version: int) -> dict[str, Any]:
        """Evaluate the version of a step.

        Returns:
            the metrics; empty if the evaluation now runs in the background and reports later.

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
        """Record a background evaluation that has ended.

        Args:
            wait: wait for one that is still running.

        Raises:
            RunError: see `at`.
        """
        running = self._running
        if running is None or not (wait or running.done()):
            return
        metrics = await running
        self._running = None
        self._record(metrics)
        self._console.eval(metrics)

    async def close(self) -> None:
        """Cancel a background evaluation that is still running."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None

    async def measure(self, step: int, version: int, *, background: bool = False) -> dict[str, Any]:
        """Run an evaluation to its end and return its metrics, under `step` and the version it
        began with.

        Raises:
            RunError: see `at`.
        """
        config = self._config
        begin = reported = time.perf_counter()
        total = len(self._tasks) * config.n
        outcomes: list[Outcome] = []
        logged: dict[int, list[TraceRecord]] = {}
        unhealthy: list[Trajectory] = []
        tools = AwayTools()
        oldest = newest = version

        def on_episode(row: int, sample: int, episode: list[Trajectory]) -> None:
            nonlocal oldest, newest, reported
            outcomes.append(Outcome.of(row, episode))
            tools.add(episode)
            number = row * config.n + sample
            healthy = episode[-1].status is EpisodeStatus.OK
            if number < config.log_generations or (config.log_generations and not healthy):
                logged[number] = [
                    TraceRecord(step, "eval", version, part, len(episode), trajectory, row=row)
                    for part, trajectory in enumerate(episode)
                ]
            if episode[-1].status is not EpisodeStatus.OK and len(unhealthy) < 100:
                unhealthy.append(episode[-1])
            versions = {v for trajectory in episode for v in set(trajectory.versions) if v is not None}
            oldest, newest = min({oldest, *versions}), max({newest, *versions})
            if not background:
                self._console.progress(len(outcomes), total, "evaluation")
            elif time.perf_counter() - reported >= PROGRESS_EVERY_S:
                reported = time.perf_counter()
                self._console.notice(f"evaluation of step {step}: {len(outcomes):,}/{total:,} episodes")

        await run_episodes(
            self._runner,
            self._tasks,
            n=config.n,
            sampling=self._recipe.eval_sampling,
            seed=self._recipe.seed_for("rollout"),
            max_concurrent=_eval_in_flight(self._recipe, background=background),
            on_episode=on_episode,
        )

        took = time.perf_counter() - begin
        numbers = await asyncio.to_thread(eval_metrics, outcomes, config.n, config.pass_reward)
        metrics = {"step": step, "version": version, **numbers}
        metrics |= {"eval/version_min": oldest, "eval/version_max": newest}
        # `time_s` counts only time in which the run only evaluates.
        metrics["eval/background_s" if background else "eval/time_s"] = took

        if logged:
            kept = [record for number in sorted(logged) for record in logged[number]]
            await self._traces.write(step, "eval", kept)

        failed = f"{metrics['eval/failed']} of {total} episodes of an evaluation failed"
        most = self._recipe.run.max_failed_fraction
        away = tools.beyond(most)
        if metrics["eval/failed"] > most * max(1, metrics["eval/episodes"]) or away is not None:
            causes = "\n  - ".join(failure_causes(unhealthy))
            raise RunError(
                f"{failed}{f'; {away}' if away else ''}. Causes:\n  - {causes}",
                "fix the cause; run.max_failed_fraction sets the limit",
            )
        if unhealthy:
            self._console.warn(failures_text(failed, unhealthy))
        return metrics
