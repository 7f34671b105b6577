"""A training run from its first check to its report: produce, train, publish.

One code path for synchronous and asynchronous training: the producer admits groups as far ahead as `max_staleness`
allows; the trainer takes them in order, minibatch by minibatch, while later ones still run.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from agentloop.config import Recipe
from agentloop.errors import InfrastructureError, RunError, WorkerError
from agentloop.runtime.lag import LoopLagMonitor
from agentloop.types import Trajectory
from agentloop.weights.layout import tensor_bytes
from trainer.algorithms.kl import KlCoefficient
from trainer.console.console import Console
from trainer.loggers import Loggers
from trainer.packing.units import packed_length
from trainer.publishing.base import Publisher, make_publisher
from trainer.publishing.server_link import ServerLink
from trainer.publishing.server_process import ServerProcess
from trainer.publishing.weights_folder import WeightsFolder
from trainer.rollouts.group_file import read_groups
from trainer.rollouts.preparation import BatchPreparation, choices
from trainer.rollouts.producer import Group, Producer
from trainer.rollouts.samples import TrainGroup
from trainer.run.checkpoints import Checkpoints
from trainer.run.episode_metrics import episode_metrics, failure_causes
from trainer.run.evaluation import Evaluation
from trainer.run.preflight import RunInputs
from trainer.run.rundir import RunDir
from trainer.run.step_sums import CriticSums, StepSums
from trainer.types import add_sums
from trainer.workers.group import WorkerGroup

T = TypeVar("T")


class Interrupted(Exception):
    """The user asked the run to stop; carries whether a checkpoint of this moment was saved."""


@dataclass
class StepClock:
    """Where a step's seconds went."""

    begin: float = field(default_factory=time.perf_counter)
    train_s: float = 0.0
    train_wait_s: float = 0.0
    publish_s: float = 0.0
    rollout_first: float = float("inf")
    rollout_last: float = 0.0

    def saw(self, group: Group) -> None:
        self.rollout_first = min(self.rollout_first, group.started_s)
        self.rollout_last = max(self.rollout_last, group.finished_s)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - begin)


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    steps: int
    interrupted: bool
    first_reward: float | None
    last_reward: float | None
    eval_first: float | None
    eval_last: float | None


class TrainRun:
    """One run of a recipe. Use `await TrainRun(...).run()` once.

    Args:
        prepared: what preflight has loaded and checked.
        run_dir: claimed for this run.
        resume: go on from the newest checkpoint, if there is one.
        loggers: where metrics go beside `metrics.jsonl`; None: nowhere.
    """

    def __init__(
        self,
        recipe: Recipe,
        prepared: RunInputs,
        run_dir: RunDir,
        console: Console,
        *,
        resume: bool,
        loggers: Loggers | None = None,
    ) -> None:
        self._recipe = recipe
        self._prepared = prepared
        self._dir = run_dir
        self._console = console
        self._resume = resume
        self._stop_requested = asyncio.Event()
        self._optimizer_ran = False
        self._version = 0
        self._served: tuple[int, Path | None] = (0, None)
        self._loggers = loggers
        self._evaluation = Evaluation(
            recipe,
            lambda: prepared.runner,
            prepared.val,
            run_dir,
            console,
            total_steps=prepared.total_steps,
            record=self._record,
        )
        self._restored: list[Group] = []
        self._done_in_step = 0
        self._samples: list[Trajectory] = []
        self._lag = LoopLagMonitor(recipe.rollout.max_loop_lag_s)
        algorithm = recipe.trainer.algorithm
        self._kl = KlCoefficient(algorithm.kl_coef, algorithm.kl_target, algorithm.kl_gain)

    async def run(self) -> RunResult:
        """Run to the end, or to Ctrl-C.

        Raises:
            RunError: too many episodes failed.
            InfrastructureError: a process died and could not be brought back.
        """
        loop = asyncio.get_running_loop()
        main = asyncio.current_task()
        assert main is not None
        for sig in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sig, self._on_signal, main)
        try:
            async with self._processes() as (workers, server, publisher):
                with self._lag:
                    return await self._train(workers, server, publisher)
        finally:
            for sig in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(sig)

    # -- life of the processes ---------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _processes(self) -> AsyncIterator[tuple[WorkerGroup, ServerProcess | None, Publisher]]:
        """Start trainer and server side by side, at the checkpoint's version when resuming; end them in any case."""
        recipe = self._recipe
        checkpoints = self._dir.list_checkpoints() if self._resume else []
        checkpoint = checkpoints[-1] if checkpoints else None
        server: ServerProcess | None = None
        weights = WeightsFolder(self._dir.weights, recipe.rollout.publish.folder, local=recipe.rollout.url is None)
        weights.open()
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._keep_weights, weights)
            start_workers = WorkerGroup.start(
                model_path=self._prepared.model_path,
                config=recipe.trainer,
                dtype=recipe.model.dtype,
                total_steps=self._optimizer_steps,
                seed=recipe.seed_for("trainer"),
                log_dir=self._dir.logs,
                reference=recipe.trainer.algorithm.kl_coef > 0,
            )
            if recipe.rollout.url is None:
                server = ServerProcess(
                    model_path=self._prepared.model_path,
                    model=recipe.model,
                    rollout=recipe.rollout,
                    seed=recipe.seed_for("rollout"),
                    log_file=self._dir.logs / "server.log",
                    weights_roots=[self._dir.weights, weights.path],
                    on_restart=self._console.warn,
                )
                stack.push_async_callback(server.stop)
            url: str | None = None
            if checkpoint is None and server is not None:
                with self._console.phase("start trainer and rollout server"):
                    workers, url = await _both(start_workers, server.start(0, None), stack)
            else:
                with self._console.phase("start trainer"):
                    workers = await start_workers
                    stack.push_async_callback(workers.close)
                if checkpoint is not None:
                    with self._console.phase(f"load checkpoint of step {checkpoint.step}"):
                        await workers.load(checkpoint.path / "trainer")
                        self._version = checkpoint.version
                        self._kl.resume(checkpoint.kl_coef)
                        self._restored = read_groups(checkpoint.path, self._prepared.train, self._prepared.rows)
            if self._resume:
                # Stopped before its first checkpoint, everything is done again.
                self._dir.rewind(checkpoint.step if checkpoint is not None else -1)
            await self._choose_folder(weights, workers)
            link = ServerLink(
                running=recipe.rollout.publish.running,
                token=recipe.rollout.admin_token or recipe.rollout.token,
                timeout_s=recipe.rollout.start_timeout_s,
            )
            stack.push_async_callback(link.close)
            publisher = make_publisher(recipe, workers, link, weights.path, self._on_folder(server))
            stack.push_async_callback(publisher.close)
            if url is None and server is not None:
                with self._console.phase("start rollout server"):
                    folder = await publisher.write(self._version)
                    # A run that was killed after its last step publishes nothing more: these are the weights it keeps.
                    self._served = self._version, folder
                    url = await server.start(self._version, folder)
            link.connect(url or str(recipe.rollout.url))
            if server is None:
                await publisher.publish(self._version)
            at_once = self._evaluation.connections
            await self._prepared.connect(url or str(recipe.rollout.url), max_concurrent=at_once)
            stack.push_async_callback(self._prepared.disconnect)
            yield workers, server, publisher

    async def _choose_folder(self, weights: WeightsFolder, workers: WorkerGroup) -> None:
        layout = await workers.layout()
        size = sum(tensor_bytes(dtype, shape) for _, dtype, shape in layout)
        if weights.passes and not weights.fits(size):
            self._console.warn(f"{weights.path} has no room for the weights: they are published in {self._dir.weights}")
            weights.fall_back()

    def _on_folder(self, server: ServerProcess | None) -> Callable[[int, Path], None]:
        def note(version: int, folder: Path) -> None:
            self._served = version, folder
            if server is not None:
                server.serves(version, folder)

        return note

    def _keep_weights(self, weights: WeightsFolder) -> None:
        version, folder = self._served
        weights.close(folder, f"v_{version}")

    def _on_signal(self, main: asyncio.Task[Any]) -> None:
        if self._stop_requested.is_set() or not self._optimizer_ran:
            self._stop_requested.set()
            main.cancel()
            return
        # Half of this step's optimizer steps are in the weights: stopping here would lose the step or tear it.
        self._stop_requested.set()
        self._console.notice("stopping after this step; Ctrl-C again to stop at once (and lose this step)")

    # -- the loop ----------------------------------------------------------------------------------------------------

    async def _train(self, workers: WorkerGroup, server: ServerProcess | None, publisher: Publisher) -> RunResult:
        recipe = self._recipe
        total = self._prepared.total_steps
        first = self._version
        await self._guard(self._evaluation.before(first, self._version), server)
        if recipe.eval.only:
            return self._result(first, interrupted=False)
        notices, warnings = choices(recipe)
        for text in notices:
            self._console.notice(text)
        for text in warnings:
            self._console.warn(text)
        producer = Producer(
            self._prepared.runner,
            self._prepared.train,
            self._prepared.rows,
            recipe.rollout,
            seed=recipe.seed_for("rollout"),
            total_steps=total,
            first_step=first,
            on_episode=self._count_episode,
            replacements=recipe.trainer.algorithm.dynamic_sampling,
            greedy_baseline=recipe.trainer.algorithm.advantage == "remax",
            step_rewards=recipe.trainer.algorithm.advantage == "grpo_process",
        )
        producer.restore(self._restored)
        checkpoints = Checkpoints(workers, self._dir, recipe.checkpoint, self._console.warn)
        step = first
        try:
            producer.admit(self._version)
            for step in range(first + 1, total + 1):
                metrics = await self._guard(self._step(step, producer, workers, server, publisher), server)
                if self._evaluation.due(step):
                    metrics |= await self._guard(self._evaluation.at(step, self._version), server)
                self._record(metrics)
                self._console.step(metrics, total)
                for culprit in self._lag.new_culprits():
                    if culprit.is_code:
                        self._console.warn(f"{culprit}; every episode waits for it (docs/agents.md: isolation)")
                self._show_samples(step)
                if metrics.get("eval/reward_mean") is not None:
                    self._console.eval(metrics)
                await self._guard(self._evaluation.settle(wait=step == total), server)
                await checkpoints.look()
                stopping = self._stop_requested.is_set() and step < total
                if stopping or self._checkpoint_due(step):
                    last = stopping or step == total
                    await checkpoints.save(self._state(step), producer.state(), wait=last)
                self._dir.prune_weights(self._version)
                if stopping:
                    return self._result(step, interrupted=True)
            return self._result(total, interrupted=False)
        except asyncio.CancelledError:
            if not self._stop_requested.is_set():
                raise
            asyncio.current_task().uncancel()  # type: ignore[union-attr]
            finished = producer.state()
            await producer.close()
            await checkpoints.settle()
            if self._version and not self._optimizer_ran:
                await checkpoints.save(self._state(self._version), finished, wait=True)
            return self._result(self._version, interrupted=True)
        finally:
            await self._evaluation.close()
            await producer.close()
            with contextlib.suppress(WorkerError):  # what broke the ranks is on its way up
                await checkpoints.settle()

    async def _step(
        self,
        step: int,
        producer: Producer,
        workers: WorkerGroup,
        server: ServerProcess | None,
        publisher: Publisher,
    ) -> dict[str, Any]:
        """Train on the groups of one step and publish the new version."""
        algorithm = self._recipe.trainer.algorithm
        preparation = BatchPreparation(self._recipe, workers, self._kl)
        batch = self._recipe.rollout.batch_size
        clock = StepClock()
        self._done_in_step = 0
        groups: list[Group] = []
        sums = StepSums()
        first, size = (step - 1) * batch, batch // algorithm.minibatches
        minibatches = [range(base, base + size) for base in range(first, first + batch, size)]
        arriving = [self._arriving(indices, preparation, producer, clock, groups) for indices in minibatches]
        if algorithm.needs_whole_batch:
            waiting = [[chunk async for chunk in chunks] for chunks in arriving]
            preparation.finish([group for chunks in waiting for chunk in chunks for group in chunk])
            arriving = [_each(chunks) for chunks in waiting]
        critic = CriticSums() if algorithm.advantage == "gae" else None
        for number, chunks in enumerate(arriving):
            policy = step > self._recipe.trainer.critic_warmup
            totals = await self._minibatch(chunks, workers, clock, preparation, policy=policy, critic=critic)
            sums.add(totals, first=number == 0)
            if totals.get("normalizer", 0.0) > 0:
                self._optimizer_ran = True
                with clock.measure("train_s"):
                    sums.optimizer(await workers.step(totals["normalizer"]))
            if critic is not None and critic.pending:
                self._optimizer_ran = True
                with clock.measure("train_s"):
                    critic.stepped(await workers.step_critic(critic.pending))
        sums.add(preparation.sums, first=False)
        self._check_failures(groups)
        with clock.measure("publish_s"):
            version = self._version + 1
            await publisher.publish(version)
        trained_version = self._version
        self._version = version
        self._kl.update(sums.kl_ref)  # before anything is awaited: a checkpoint of this version holds it
        self._optimizer_ran = False
        producer.admit(version)
        await self._trace(step, groups)
        metrics = self._metrics(step, groups, trained_version, sums, clock) | preparation.metrics
        metrics |= critic.metrics if critic is not None else {}
        return metrics

    async def _arriving(
        self, indices: range, preparation: BatchPreparation, producer: Producer, clock: StepClock, groups: list[Group]
    ) -> AsyncIterator[list[TrainGroup]]:
        """The groups of one minibatch in chunks that are worth a call, prepared, while its later groups still run.

        Where a chunk ends depends on the groups' tokens alone, never on timing: floating-point sums, and so a resumed
        run, come out the same to the bit.
        """
        budget = self._recipe.trainer.tokens_per_micro_batch * self._recipe.trainer.ranks
        chunk: list[TrainGroup] = []
        tokens = 0
        for index in indices:
            with clock.measure("train_wait_s"):
                group = await producer.take(index)
            clock.saw(group)
            groups.append(group)
            chunk.append(preparation.collect(group))
            tokens += packed_length(chunk[-1].samples)
            if tokens >= budget or index == indices[-1]:
                with clock.measure("train_s"):
                    await preparation.prepare(chunk)
                yield chunk
                chunk, tokens = [], 0

    @property
    def _optimizer_steps(self) -> int:
        """The policy's in the whole run: what its learning rate's schedule is stretched over."""
        trainer = self._recipe.trainer
        return max(1, self._prepared.total_steps - trainer.critic_warmup) * trainer.algorithm.minibatches

    async def _minibatch(
        self,
        chunks: AsyncIterator[list[TrainGroup]],
        workers: WorkerGroup,
        clock: StepClock,
        preparation: BatchPreparation,
        *,
        policy: bool,
        critic: CriticSums | None,
    ) -> dict[str, float]:
        """Accumulate the gradients of one minibatch, chunk by chunk.

        Args:
            policy: whether the policy is trained; while the critic warms up it is not.
        """
        totals: dict[str, float] = {}
        temperature = self._recipe.rollout.sampling.temperature
        async for chunk in chunks:
            samples = [sample for group in chunk for sample in group.samples]
            if not samples:
                continue
            with clock.measure("train_s"):
                if policy:
                    part = await workers.accumulate(samples, temperature=temperature, loss=preparation.loss)
                    add_sums(totals, part)
                if critic is not None:
                    critic.add(await workers.accumulate_values(preparation.value_samples(chunk)))
        return totals

    # -- metrics, checkpoints, traces ---------------------------------------------------------------------------------

    def _record(self, metrics: dict[str, Any]) -> None:
        """Write a line of `metrics.jsonl`, and hand it to the loggers."""
        self._dir.append_metrics(metrics)
        if self._loggers is not None:
            self._loggers.log(metrics)

    def _checkpoint_due(self, step: int) -> bool:
        every = self._recipe.checkpoint.every
        return step == self._prepared.total_steps or (every is not None and step % every == 0)

    def _state(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of the run beside the trainer's tensors."""
        return {"step": step, "version": self._version, "kl_coef": self._kl.value}

    async def _trace(self, step: int, groups: list[Group]) -> None:
        trace = self._recipe.trace
        trajectories = [t for group in groups for t in group.trajectories]
        last = step == self._prepared.total_steps
        if step == 1 or last or step % trace.train_every == 0:
            await asyncio.to_thread(self._dir.write_trace, step, "train", trajectories[: trace.max_trajectories])
        self._samples = _varied(trajectories, trace.print_samples)

    def _show_samples(self, step: int) -> None:
        every = self._recipe.trace.print_every
        if every and (step % every == 0 or step == 1):
            self._console.samples([self._prepared.sample(t, step) for t in self._samples])

    # -- small things ------------------------------------------------------------------------------------------------

    async def _guard(self, work: Awaitable[T], server: ServerProcess | None) -> T:
        """Await `work`, but not on a server that has been given up."""
        task = asyncio.ensure_future(work)
        if server is None or server.died is None:
            return await task
        try:
            await asyncio.wait([task, server.died], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        if server.died.done() and not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            server.died.result()
        return await task

    def _check_failures(self, groups: list[Group]) -> None:
        last = [episode[-1] for group in groups for episode in (*group.episodes, group.baseline) if episode]
        failed = [t for t in last if t.status.value != "ok"]
        if len(failed) > self._recipe.run.max_failed_fraction * len(last):
            raise RunError(
                f"{len(failed)} of {len(last)} episodes of this step failed. First causes:\n  - "
                + "\n  - ".join(failure_causes(failed)),
                "mend the cause, then continue with --resume; run.max_failed_fraction sets the bound",
            )
        if failed:
            self._console.warn(f"{len(failed)} of {len(last)} episodes failed: " + "; ".join(failure_causes(failed, 1)))

    def _count_episode(self, _: list[Trajectory]) -> None:
        self._done_in_step += 1
        self._console.progress(
            self._done_in_step, self._recipe.rollout.batch_size * self._recipe.rollout.group_size, "episodes"
        )

    def _metrics(
        self, step: int, groups: list[Group], trained_version: int, sums: StepSums, clock: StepClock
    ) -> dict[str, Any]:
        now = time.perf_counter()
        episodes = episode_metrics(groups, trained_version)
        rollout_s = max(1e-9, clock.rollout_last - clock.rollout_first)
        metrics = {
            "step": step,
            "version": self._version,
            **episodes,
            **self._lag.take(),
            "rollout/time_s": rollout_s,
            "rollout/tokens_per_s": episodes["rollout/tokens"] / rollout_s,
            "rollout/wait_s": max(0.0, now - max(clock.rollout_last, clock.begin)),
            "train/time_s": clock.train_s,
            "train/wait_s": clock.train_wait_s,
            "publish/time_s": clock.publish_s,
            "step/time_s": now - clock.begin,
            **sums.metrics(clock.train_s),
        }
        if self._recipe.trainer.algorithm.dynamic_sampling:
            metrics["dynamic_sampling/replaced"] = sum(group.replaced for group in groups)
            metrics["dynamic_sampling/given_up"] = sum(group.given_up for group in groups)
        mismatch = metrics.get("mismatch/logprob_abs_mean")
        correction = self._recipe.trainer.algorithm.correction
        if mismatch is not None and mismatch > self._recipe.trainer.mismatch_warn and not correction.chosen:
            self._console.warn(
                f"engine and trainer disagree: mean |logprob difference| {mismatch:.3g} is above trainer.mismatch_warn "
                f"{self._recipe.trainer.mismatch_warn:g}, and no correction is chosen: the loss takes the engine's "
                "probabilities for the trainer's. Check dtype, temperature and that the published weights arrived; "
                "where the difference is meant (low precision, max_staleness), set trainer.algorithm.correction: "
                "decoupled, importance, importance_cap, mask, veto (docs/algorithms.md)"
            )
        return metrics

    def _result(self, step: int, *, interrupted: bool) -> RunResult:
        rows = [row for row in self._dir.read_metrics() if row.get("reward/mean") is not None]
        evals = self._evaluation.rewards
        return RunResult(
            steps=step,
            interrupted=interrupted,
            first_reward=rows[0]["reward/mean"] if rows else None,
            last_reward=rows[-1]["reward/mean"] if rows else None,
            eval_first=evals[0] if evals else None,
            eval_last=evals[-1] if evals else None,
        )


async def _each(chunks: list[list[TrainGroup]]) -> AsyncIterator[list[TrainGroup]]:
    """What has been waited for, as if it came now."""
    for chunk in chunks:
        yield chunk


async def _both(
    start_workers: Awaitable[WorkerGroup], start_server: Awaitable[str], stack: contextlib.AsyncExitStack
) -> tuple[WorkerGroup, str]:
    """Start the two at once; when one fails, the other is still ended by the stack and the first error is raised."""
    results = await asyncio.gather(start_workers, start_server, return_exceptions=True)
    workers, url = results
    if not isinstance(workers, BaseException):
        stack.push_async_callback(workers.close)
    for result in results:
        if isinstance(result, InfrastructureError):
            raise result
    for result in results:
        if isinstance(result, BaseException):
            raise result
    assert not isinstance(workers, BaseException) and not isinstance(url, BaseException)
    return workers, url


def _varied(trajectories: list[Trajectory], count: int) -> list[Trajectory]:
    """A few trajectories that differ in reward where they can: the best and the worst first."""
    scored = sorted((t for t in trajectories if t.reward is not None), key=lambda t: t.reward or 0.0)
    if len(scored) <= count:
        return scored
    return [scored[-1], scored[0], *scored[1:-1]][:count]
