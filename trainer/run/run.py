"""A training run: produce, train, publish. `TrainRun._train` is the loop.

Synchronous and asynchronous training share one code path: the producer admits groups as far ahead
as `max_staleness` allows, and the trainer takes them in order while later ones still run.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from agentloop.config import Recipe, RolloutConfig
from agentloop.config.section import Section
from agentloop.errors import WorkerError
from agentloop.runtime.lag import LoopLagMonitor
from agentloop.trace.record import TraceRecord
from agentloop.trace.sender import SpanSender
from agentloop.types import Trajectory
from trainer.console.console import EPISODES, TRAINING, Console
from trainer.loggers import Loggers
from trainer.publishing.weights_folder import prune_versions
from trainer.rollouts.group_file import read_groups
from trainer.rollouts.producer import Group, Producer
from trainer.run.checkpoints import Checkpoints
from trainer.run.control import RunRequests, listening
from trainer.run.evaluation import Evaluation
from trainer.run.notices import algorithm_notices, algorithm_warnings, unknown_best_metric
from trainer.run.preflight import RunInputs
from trainer.run.processes import Processes, start_processes
from trainer.run.rundir import RunDir
from trainer.run.step import FailedStep, PolicyState, StepTrainer
from trainer.run.stop import StopRequest
from trainer.run.traces import RunSignals, RunTraces

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class RunResult:
    """The outcome of a run."""

    steps: int
    interrupted: bool
    first_reward: float | None
    last_reward: float | None
    eval_first: float | None
    eval_last: float | None


@dataclass
class _UnrecordedStep:
    """A step whose version is served, and whose line is not in `metrics.jsonl` yet.

    Attributes:
        records: its trace, until the store begins to write it; None: not traced.
    """

    metrics: dict[str, Any]
    records: list[TraceRecord] | None


class TrainRun:
    """One run of a recipe. Call `await TrainRun(...).run()` once.

    Args:
        inputs: what preflight loaded and checked.
        run_dir: claimed and opened for this run.
        resume: continue from `run_dir.resume_point`, if there is one.
        loggers: further destinations of metrics beside `metrics.jsonl`; None: no others.
        sender: sends the episodes of traced steps; None: nothing does.
    """

    def __init__(
        self,
        recipe: Recipe,
        inputs: RunInputs,
        run_dir: RunDir,
        console: Console,
        *,
        resume: bool,
        loggers: Loggers | None = None,
        sender: SpanSender | None = None,
    ) -> None:
        self._recipe = recipe
        self._inputs = inputs
        self._dir = run_dir
        self._console = console
        self._resume = resume
        self._loggers = loggers
        self._checkpoint = run_dir.resume_point if resume else None
        self._policy = PolicyState.at(self._checkpoint, recipe.trainer.algorithm)
        self._stop = StopRequest(lambda: self._policy.updating, console.notice)
        self._traces = RunTraces(
            run_dir.root,
            recipe.trace,
            seed=recipe.seed,
            total_steps=inputs.total_steps,
            notice=console.notice,
            sender=sender,
        )
        self._warned_of_best = False
        self._signals = RunSignals(run_dir.root, console, self._traces.due)
        self._unrecorded: _UnrecordedStep | None = None
        self._requests: RunRequests | None = None

    async def run(self) -> RunResult:
        """Run to the end, or until Ctrl-C.

        Raises:
            RunError: too many episodes failed.
            InfrastructureError: a process died and could not be restarted.
            CancelledError: Ctrl-C before the first step; there is nothing to save.
        """
        recipe, inputs, checkpoint = self._recipe, self._inputs, self._checkpoint
        finished = read_groups(checkpoint.path, inputs.train, inputs.rows) if checkpoint is not None else []
        with self._stop.on_signals():
            async with start_processes(recipe, inputs, self._dir, self._console, checkpoint) as processes:
                if self._resume:
                    # A run stopped before its first checkpoint starts over.
                    step = checkpoint.step if checkpoint is not None else 0
                    self._dir.rewind(step or -1, self._console.warn)
                    self._traces.resume()
                    self._console.resumed(step, next(iter(self._evals()), None))
                    await self._signals.resume()
                requests = self._requests = RunRequests(processes, self._place, self._console.notice)
                async with listening(self._dir.root, requests.handlers, self._console.warn):
                    with LoopLagMonitor(recipe.rollout.max_loop_lag_s) as lag:
                        return await self._train(processes, lag, finished)

    @property
    def progressed(self) -> bool:
        """Whether this process trained a step: repeating the command does not only fail again."""
        return self._policy.version > (self._checkpoint.version if self._checkpoint is not None else 0)

    def as_scaled(self, recipe: Recipe) -> Recipe:
        """Return a recipe with the last numbers of replicas and agent workers of this run."""
        requests = self._requests
        if requests is not None and requests.replicas is not None:
            recipe = _with(recipe, "rollout", _with(recipe.rollout, "replicas", requests.replicas))
        if requests is not None and requests.workers is not None:
            agents = _with(recipe.cluster.agents, "workers", requests.workers)
            recipe = _with(recipe, "cluster", _with(recipe.cluster, "agents", agents))
        return recipe

    @property
    def stopping(self) -> bool:
        """Whether the user has asked it to stop."""
        return self._stop.requested

    def _place(self) -> dict[str, int]:
        """Return where the run is."""
        version = self._policy.version
        return {"step": version, "steps": self._inputs.total_steps, "version": version}

    # -- the loop
    # ------------------------------------------------------------------------------------

    async def _train(self, processes: Processes, lag: LoopLagMonitor, finished: Sequence[Group]) -> RunResult:
        """Evaluate and train, step by step.

        Args:
            finished: groups of the checkpoint that are finished but not trained yet.
        """
        console, policy, total = self._console, self._policy, self._inputs.total_steps
        first, traces, signals = policy.version, self._traces, self._signals
        evaluation = Evaluation(
            self._recipe,
            processes.runner,
            self._inputs.val,
            self._dir,
            console,
            total_steps=total,
            record=self._record,
            traces=traces,
        )

        await processes.guard(evaluation.before(first, policy.version))
        if self._recipe.eval.only:
            await traces.settle()
            return self._result(first)

        self._announce_algorithm()
        progress = _StepProgress(console, self._recipe.rollout)
        producer = self._make_producer(processes, progress)
        producer.restore(finished)
        trainer = StepTrainer(
            self._recipe,
            policy,
            processes.workers,
            processes.publisher,
            console.warn,
            signals.said,
            processes.colocation,
            on_trained=progress.trained,
            image_token=self._inputs.renderer.image_token,
        )
        checkpoints = Checkpoints(processes.workers, self._dir, self._recipe.checkpoint, console.warn)

        try:
            producer.admit(policy.version)
            for step in range(first + 1, total + 1):
                progress.restart()
                metrics, samples = await processes.guard(self._step(step, trainer, producer))
                metrics |= lag.take()
                if processes.agent_workers is not None:
                    metrics |= processes.agent_workers.take_metrics()
                if evaluation.due(step):
                    metrics |= await processes.guard(evaluation.at(step, policy.version))
                self._record(metrics)
                self._unrecorded = None
                self._show(metrics, samples, lag)
                await processes.guard(evaluation.settle(wait=step == total))

                await checkpoints.look()
                stopping = self._stop.requested and step < total
                if stopping or checkpoints.due(step, total):
                    last = stopping or step == total
                    await traces.settle()  # a resumed run does not write the traces up to its checkpoint again
                    await checkpoints.save(policy.saved(step), producer.state(), wait=last)
                prune_versions(self._dir.weights, policy.version)

                if stopping:
                    return self._result(step, interrupted=True)

            return self._result(total)
        except asyncio.CancelledError:
            if not self._stop.requested:
                raise
            await self._save_at_once(producer, checkpoints)
            return self._result(policy.version, interrupted=True)
        finally:
            await evaluation.close()
            await producer.close()
            await traces.close()
            await signals.settle()
            if not self._stop.insisted:
                with contextlib.suppress(WorkerError):  # the error that broke the ranks is being raised
                    await checkpoints.settle()

    async def _step(
        self, step: int, trainer: StepTrainer, producer: Producer
    ) -> tuple[dict[str, Any], list[Trajectory]]:
        """Run one step; return its metrics and a few samples. The other trajectories are released
        when their trace is written."""
        traced = self._traces.due(step)
        try:
            trained = await trainer.run(step, producer, traced=traced)
        except FailedStep as failed:  # its trace is what shows why, also of a step that is not due
            await self._traces.write(step, "train", failed.step.records(self._inputs.rows))
            raise
        # From here on the version is served, and Ctrl-C saves a checkpoint of this step.
        records, metrics = trained.records(self._inputs.rows), trained.metrics()
        self._unrecorded = _UnrecordedStep(metrics, records if traced else None)
        await self._write_trace(self._unrecorded)

        self._signals.add_row(metrics)
        await self._signals.look(step, records)
        return metrics, varied(trained.trajectories, self._recipe.trace.print_samples)

    async def _write_trace(self, step: _UnrecordedStep) -> None:
        """Begin to write the trace of a step, unless that has been done."""
        if step.records is not None:
            await self._traces.write(step.metrics["step"], "train", step.records)
            step.records = None

    def _make_producer(self, processes: Processes, progress: _StepProgress) -> Producer:
        """Make the producer of the remaining steps."""
        recipe, inputs, algorithm = self._recipe, self._inputs, self._recipe.trainer.algorithm
        return Producer(
            processes.runner,
            inputs.train,
            inputs.rows,
            recipe.rollout,
            seed=recipe.seed_for("rollout"),
            total_steps=inputs.total_steps,
            first_step=self._policy.version,
            on_episode=progress.count,
            replacements=algorithm.dynamic_sampling,
            greedy_baseline=algorithm.needs.greedy_episode,
            step_rewards=algorithm.needs.step_rewards,
        )

    async def _save_at_once(self, producer: Producer, checkpoints: Checkpoints) -> None:
        """Save the last step after Ctrl-C, unless the next one has already changed the weights."""
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()

        self._console.notice("stopping: press Ctrl-C again to stop without a checkpoint")
        # Before the producer is closed: closing cancels running groups, and finished ones are kept.
        finished = producer.state()
        await producer.close()
        await checkpoints.settle()
        if (step := self._unrecorded) is not None:
            # Ctrl-C came between the new version and its line, for instance during the evaluation.
            await self._write_trace(step)
            self._record(step.metrics)
        if self._policy.version and not self._policy.updating:
            await self._traces.settle()
            await checkpoints.save(self._policy.saved(self._policy.version), finished, wait=True)

    # -- what the user sees
    # ---------------------------------------------------------------------------

    def _announce_algorithm(self) -> None:
        algorithm = self._recipe.trainer.algorithm
        for text in algorithm_notices(algorithm):
            self._console.notice(text)
        for text in algorithm_warnings(algorithm):
            self._console.warn(text)

    def _record(self, metrics: dict[str, Any], *, amend: bool = False) -> None:
        """Write a line of `metrics.jsonl` and pass it to the loggers.

        Args:
            amend: add the metrics to the line of their step instead.
        """
        if amend:
            self._dir.amend_metrics(metrics)
        else:
            self._dir.append_metrics(metrics)
        if not self._warned_of_best and (text := unknown_best_metric(self._recipe, metrics)) is not None:
            self._warned_of_best = True
            self._console.warn(text)
        self._signals.add_row(metrics)
        if self._loggers is not None:
            self._loggers.log(metrics)

    def _show(self, metrics: dict[str, Any], samples: Sequence[Trajectory], lag: LoopLagMonitor) -> None:
        """Print a step: its metrics, what blocked the event loop, a few samples, its evaluation."""
        every, step = self._recipe.trace.print_every, metrics["step"]
        self._console.step(metrics, self._inputs.total_steps)
        for culprit in lag.new_culprits():
            if culprit.is_code:
                self._console.warn(f"{culprit}; every episode waits for it (docs/agents.md, Where blocking code runs)")

        if every and (step % every == 0 or step == 1):
            self._console.samples([self._inputs.sample(trajectory, step) for trajectory in samples])
        if metrics.get("eval/reward_mean") is not None:
            self._console.eval(metrics)

    def _result(self, step: int, *, interrupted: bool = False) -> RunResult:
        # From the file, which also has the steps from before a resume.
        rewards = [reward for row in self._dir.read_metrics() if (reward := row.get("reward/mean")) is not None]
        evals = self._evals()
        return RunResult(
            steps=step,
            interrupted=interrupted,
            first_reward=rewards[0] if rewards else None,
            last_reward=rewards[-1] if rewards else None,
            eval_first=evals[0] if len(evals) > 1 else None,
            eval_last=evals[-1] if evals else None,
        )

    def _evals(self) -> list[float]:
        """Return the mean rewards of all evaluations so far."""
        return [reward for row in self._dir.read_metrics() if (reward := row.get("eval/reward_mean")) is not None]


def _with(section: S, key: str, value: object) -> S:
    """Return a copy of a section with another value."""
    return section.model_copy(update={key: value})


class _StepProgress:
    """The progress of a step: its episodes, and once all have finished, the groups trained."""

    def __init__(self, console: Console, rollout: RolloutConfig) -> None:
        self._console = console
        self._groups = rollout.batch_size
        self._episodes = rollout.batch_size * rollout.group_size
        self._done = 0

    def restart(self) -> None:
        """Begin a step."""
        self._done = 0

    def count(self, _: list[Trajectory]) -> None:
        """Count a finished episode."""
        self._done += 1
        self._console.progress(self._done, self._episodes, EPISODES)

    def trained(self, groups: int) -> None:
        """Note how many groups of the step are trained. A long step shows that it goes on."""
        if self._done >= self._episodes:
            self._console.progress(groups, self._groups, TRAINING)


def varied(trajectories: Sequence[Trajectory], count: int) -> list[Trajectory]:
    """Return a few scored trajectories of different rewards: the best and the worst first."""
    scored = sorted((t for t in trajectories if t.reward is not None), key=lambda t: t.reward or 0.0)
    if len(scored) <= count:
        return scored
    return [scored[-1], scored[0], *scored[1:-1]][:count]
