"""One training step: groups in, a published version and its metrics out.

    groups as they finish -> chunks -> preparation -> accumulate -> optimizer step -> publish

`StepTrainer` runs a step; it needs only ranks, a publisher and a producer.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agentloop.config import AlgorithmConfig, Recipe
from agentloop.errors import RunError
from agentloop.trace.record import TraceRecord
from agentloop.types import EpisodeStatus, Trajectory
from trainer.algorithms.dynamic_sampling import replacement
from trainer.algorithms.kl import KlCoefficient
from trainer.packing.units import packed_length
from trainer.publishing.base import Publisher
from trainer.rollouts.preparation import BatchPreparation
from trainer.rollouts.producer import Group, PicksRows, Producer
from trainer.rollouts.samples import TrainGroup
from trainer.run.colocation import Colocation
from trainer.run.episode_metrics import AwayTools, episode_metrics, failure_causes, failures_text
from trainer.run.notices import mismatch_warning, signal_warnings
from trainer.run.rundir import CheckpointState
from trainer.run.step_sums import CriticSums, StepSums
from trainer.types import TrainSample, add_sums
from trainer.workers.group import WorkerGroup


@dataclass
class PolicyState:
    """The state of the policy beside its tensors.

    Attributes:
        version: the version that the ranks hold and the server serves.
        kl: the coefficient of the KL term.
        updating: whether optimizer steps of a version that is not published yet have run. Stopping
            now would lose the step, and the weights belong to no version.
    """

    version: int
    kl: KlCoefficient
    updating: bool = False

    @classmethod
    def at(cls, checkpoint: CheckpointState | None, algorithm: AlgorithmConfig) -> PolicyState:
        """Return the state of a checkpoint; None: of a new run."""
        kl = KlCoefficient(algorithm.kl_coef, algorithm.kl_target, algorithm.kl_gain)
        if checkpoint is None:
            return cls(0, kl)
        kl.resume(checkpoint.kl_coef)
        return cls(checkpoint.version, kl)

    def saved(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint of `step` records in `state.json`."""
        return {"step": step, "version": self.version, "kl_coef": self.kl.value}


@dataclass
class StepClock:
    """The durations of a step's parts."""

    begin: float = field(default_factory=time.perf_counter)
    train_s: float = 0.0
    train_wait_s: float = 0.0
    publish_s: float = 0.0
    rollout_wait_s: float = 0.0
    rollout_first: float = float("inf")
    rollout_last: float = 0.0

    def saw(self, group: Group) -> None:
        """Extend the time span of the step's rollouts by a group."""
        self.rollout_first = min(self.rollout_first, group.started_s)
        self.rollout_last = max(self.rollout_last, group.finished_s)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the duration of the block to the attribute `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - begin)


@dataclass(frozen=True)
class TrainedStep:
    """A step whose version is served.

    Attributes:
        version: the new version.
        groups: the groups that were trained.
        numbers: metrics of training and of the chosen algorithm.
        samples: what was trained of each trajectory, by `id` of the trajectory.
    """

    step: int
    version: int
    groups: list[Group]
    clock: StepClock
    numbers: dict[str, Any]
    samples: dict[int, TrainSample] = field(default_factory=dict)

    @property
    def trajectories(self) -> list[Trajectory]:
        return [trajectory for group in self.groups for trajectory in group.trajectories]

    def records(self, rows: PicksRows) -> list[TraceRecord]:
        """Return what the step's trace holds.

        Args:
            rows: the row of a group, by the group's index.
        """
        found = []
        for group in self.groups:
            row = rows[replacement(group.index, group.replaced)]
            for episode in group.episodes:
                for part, trajectory in enumerate(episode):
                    record = TraceRecord(self.step, "train", self.version - 1, part, len(episode), trajectory, row=row)
                    if (sample := self.samples.get(id(trajectory))) is not None:
                        record.advantages = sample.advantages
                        record.trainer_logprobs = _shown_logprobs(sample)
                    found.append(record)
        return found

    def metrics(self) -> dict[str, Any]:
        """Return the step's line of `metrics.jsonl`. `step/time_s` ends at this call."""
        now, clock = time.perf_counter(), self.clock
        episodes = episode_metrics(self.groups, self.version - 1)
        rollout_s = max(1e-9, clock.rollout_last - clock.rollout_first)
        return {
            "step": self.step,
            "version": self.version,
            **episodes,
            "rollout/time_s": rollout_s,
            "rollout/tokens_per_s": episodes["rollout/tokens"] / rollout_s,
            "rollout/wait_s": clock.rollout_wait_s,
            "train/time_s": clock.train_s,
            "train/wait_s": clock.train_wait_s,
            "publish/time_s": clock.publish_s,
            "step/time_s": now - clock.begin,
            **self.numbers,
        }


class FailedStep(RunError):
    """Too many episodes of a step failed.

    Attributes:
        step: the step, for its trace; its version is not published.
    """

    step: TrainedStep


class StepTrainer:
    """Run the training steps of a recipe.

    Args:
        policy: advanced by one version with each step.
        warn: called with each warning.
        said: called with the kind of each warning that a signal would repeat.
        colocation: hands the GPUs over, if engine and trainer share them.
        on_trained: called with the number of the step's groups that have been trained so far.
        image_token: the placeholder of images; None: the model takes none.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: PolicyState,
        workers: WorkerGroup,
        publisher: Publisher,
        warn: Callable[[str], None],
        said: Callable[[str], None] = lambda _: None,
        colocation: Colocation | None = None,
        on_trained: Callable[[int], None] = lambda _: None,
        image_token: int | None = None,
    ) -> None:
        self._recipe = recipe
        self._on_trained = on_trained
        self._colocation = colocation
        self._policy = policy
        self._workers = workers
        self._publisher = publisher
        self._warn = warn
        self._on_said = said
        self._image_token = image_token
        self._said: set[str] = set()

    async def run(self, step: int, producer: Producer, *, traced: bool = False) -> TrainedStep:
        """Train on the groups of one step, publish the new version, admit the groups it allows.

        Args:
            traced: keep what `TrainedStep.records` shows of the training.

        Raises:
            FailedStep: too many episodes failed.
            WorkerError: a rank failed.
            ServerError: the version could not be published.
        """
        policy = self._policy
        idle_before = producer.idle_s
        preparation = BatchPreparation(self._recipe, self._workers, policy.kl, image_token=self._image_token)
        update = _Update(self._recipe, policy, self._workers, producer, preparation, self._on_trained, traced=traced)
        if self._colocation is not None:
            batch = self._recipe.rollout.batch_size
            with update.clock.measure("train_wait_s"):
                await producer.wait(range((step - 1) * batch, step * batch))
            with update.clock.measure("train_s"):
                await self._colocation.to_trainer()
        await update.run(step)
        try:
            check_failures(update.groups, self._recipe.run.max_failed_fraction, self._warn)
        except FailedStep as failed:
            failed.step = TrainedStep(step, policy.version + 1, update.groups, update.clock, {}, update.samples)
            raise

        with update.clock.measure("publish_s"):
            if self._colocation is not None:
                await self._colocation.publish(self._publisher, policy.version + 1)
            else:
                await self._publisher.publish(policy.version + 1)

        # Without an await in between: Ctrl-C then saves a checkpoint of either the old or the new
        # version.
        policy.version += 1
        policy.kl.update(update.sums.kl_ref)
        policy.updating = False
        producer.admit(policy.version)
        update.clock.rollout_wait_s = producer.idle_s - idle_before

        numbers = update.numbers()
        if warning := mismatch_warning(self._recipe.trainer, numbers["mismatch/logprob_abs_mean"]):
            self._on_said("mismatch")
            self._warn(warning)
        for kind, text in signal_warnings(self._recipe, step, update.groups).items():
            if kind not in self._said:  # the same holds for most later steps
                self._said.add(kind)
                self._on_said(kind)
                self._warn(text)
        return TrainedStep(step, policy.version, update.groups, update.clock, numbers, update.samples)


class _Update:
    """The update of one step: its collaborators, and its sums over minibatches."""

    def __init__(
        self,
        recipe: Recipe,
        policy: PolicyState,
        workers: WorkerGroup,
        producer: Producer,
        preparation: BatchPreparation,
        on_trained: Callable[[int], None],
        *,
        traced: bool,
    ) -> None:
        self._recipe = recipe
        self._on_trained = on_trained
        self._trained = 0
        self._traced = traced
        self._algorithm = recipe.trainer.algorithm
        self._policy = policy
        self._workers = workers
        self._producer = producer
        self._preparation = preparation
        self._critic = CriticSums() if self._algorithm.needs.critic else None
        self.groups: list[Group] = []
        self.samples: dict[int, TrainSample] = {}
        self.clock = StepClock()
        self.sums = StepSums()

    async def run(self, step: int) -> None:
        """Take the groups of a step and train on them, minibatch by minibatch."""
        batch, count = self._recipe.rollout.batch_size, self._algorithm.minibatches
        first, size = (step - 1) * batch, batch // count
        arriving = [self._arriving(range(base, base + size)) for base in range(first, first + batch, size)]

        if self._algorithm.needs_whole_batch:
            collected = [[chunk async for chunk in chunks] for chunks in arriving]
            self._preparation.finish([group for chunks in collected for chunk in chunks for group in chunk])
            arriving = [_replay(chunks) for chunks in collected]

        # While the critic warms up, the policy is not trained.
        train_policy = step > self._recipe.trainer.critic_warmup
        for number, chunks in enumerate(arriving):
            # After the first optimizer step, the weights are no longer those before the update.
            keep = self._traced and number == 0
            totals = await self._accumulate(chunks, train_policy=train_policy, keep_logprobs=keep)
            self.sums.add(totals, first=number == 0)
            await self._step_optimizers(totals.get("normalizer", 0.0))
        self.sums.add(self._preparation.sums, first=False)

    async def _arriving(self, indices: range) -> AsyncIterator[list[TrainGroup]]:
        """Yield the prepared groups of one minibatch in chunks worth a call, while later groups
        still run.

        The end of a chunk depends only on the groups' tokens, never on timing: floating-point sums,
        and therefore a resumed run, are reproduced to the bit.
        """
        budget = self._recipe.trainer.tokens_per_micro_batch * self._recipe.trainer.ranks
        chunk: list[TrainGroup] = []
        tokens = 0
        for index in indices:
            with self.clock.measure("train_wait_s"):
                group = await self._producer.take(index)
            self.clock.saw(group)
            self.groups.append(group)

            chunk.append(self._preparation.collect(group))
            tokens += packed_length(chunk[-1].samples)
            if tokens >= budget or index == indices[-1]:
                with self.clock.measure("train_s"):
                    await self._preparation.prepare(chunk)
                yield chunk
                chunk, tokens = [], 0

    async def _accumulate(
        self, chunks: AsyncIterator[list[TrainGroup]], *, train_policy: bool, keep_logprobs: bool
    ) -> dict[str, float]:
        """Accumulate the gradients of one minibatch, chunk by chunk; return the policy's sums."""
        totals: dict[str, float] = {}
        temperature = self._recipe.rollout.sampling.temperature
        async for chunk in chunks:
            samples = [sample for group in chunk for sample in group.samples]
            self._trained += len(chunk)
            if not samples:
                continue
            if self._traced:
                self._remember(chunk)
            with self.clock.measure("train_s"):
                if train_policy:
                    sums = await self._workers.accumulate(
                        samples, temperature=temperature, loss=self._preparation.loss, keep_logprobs=keep_logprobs
                    )
                    add_sums(totals, sums)
                if self._critic is not None:
                    values = self._preparation.value_samples(chunk)
                    self._critic.add(await self._workers.accumulate_values(values))
            self._on_trained(self._trained)
        return totals

    def _remember(self, chunk: list[TrainGroup]) -> None:
        """Keep the samples of a chunk for the trace."""
        for batch in chunk:
            for episode in batch.episodes:
                for trajectory, sample in zip(episode.kept, episode.samples, strict=True):
                    self.samples[id(trajectory)] = sample

    async def _step_optimizers(self, normalizer: float) -> None:
        """Step the optimizers of policy and critic, each if it has an accumulated gradient."""
        if normalizer > 0:
            self._policy.updating = True
            with self.clock.measure("train_s"):
                self.sums.optimizer(await self._workers.step(normalizer))
        if self._critic is not None and self._critic.pending:
            self._policy.updating = True
            with self.clock.measure("train_s"):
                self._critic.stepped(await self._workers.step_critic(self._critic.pending))

    def numbers(self) -> dict[str, Any]:
        """Return the metrics of training and of the chosen algorithm."""
        numbers = self.sums.metrics(self.clock.train_s)
        if self._algorithm.dynamic_sampling:
            numbers["dynamic_sampling/replaced"] = sum(group.replaced for group in self.groups)
            numbers["dynamic_sampling/given_up"] = sum(group.given_up for group in self.groups)
        numbers |= self._preparation.metrics
        return numbers | (self._critic.metrics if self._critic is not None else {})


def _shown_logprobs(sample: TrainSample) -> np.ndarray | None:
    """Return the trainer's logprobs before the update, NaN where the mask is 0; None: unknown."""
    known = sample.proximal_logprobs if sample.trainer_logprobs is None else sample.trainer_logprobs
    return None if known is None else np.where(sample.loss_mask, known, np.float32(np.nan))


def check_failures(groups: list[Group], max_fraction: float, warn: Callable[[str], None]) -> None:
    """Warn of failed episodes.

    Raises:
        FailedStep: more than `max_fraction` of the episodes failed, or of those that called a tool
            that was away; the message has the causes.
    """
    last, tools = [], AwayTools()
    for group in groups:
        for episode in filter(None, (*group.episodes, group.baseline)):
            last.append(episode[-1])
            tools.add(episode)
    failed = [trajectory for trajectory in last if trajectory.status is not EpisodeStatus.OK]
    away = tools.beyond(max_fraction)
    if len(failed) > max_fraction * len(last) or away is not None:
        raise FailedStep(
            f"{len(failed)} of {len(last)} episodes of this step failed{f'; {away}' if away else ''}. Causes:\n  - "
            + "\n  - ".join(failure_causes(failed)),
            "fix the cause, then continue with --resume; run.max_failed_fraction sets the limit",
        )
    if failed:
        warn(failures_text(f"{len(failed)} of {len(last)} episodes failed", failed))


async def _replay(chunks: list[list[TrainGroup]]) -> AsyncIterator[list[TrainGroup]]:
    """Yield collected chunks as an async iterator."""
    for chunk in chunks:
        yield chunk
