"""All ranks of the trainer, driven from the main process.

group = await WorkerGroup.start(model_path=..., config=..., ...)
sums = await group.accumulate(samples, temperature=1.0)      # as often as groups of episodes finish
await group.step(sums["normalizer"])                         # one optimizer step over all of them
await group.publish(folder)
await group.close()
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from agentloop.config import OptimConfig, TrainerConfig
from agentloop.errors import AgentloopError, WorkerError
from agentloop.launch.base import Launcher
from agentloop.launch.local import LocalLauncher
from agentloop.model_folder import ModelFolder
from trainer.algorithms.aggregation import normalizer
from trainer.channel import samples_to_arrays
from trainer.packing.units import split_over_ranks
from trainer.rank_commands import (
    Accumulate,
    AccumulateValues,
    Command,
    Layout,
    Load,
    Logprobs,
    PublishedLayout,
    PublishWeights,
    ResetOptimizer,
    SampleCommand,
    Save,
    Saved,
    Start,
    Step,
    StepCritic,
    Values,
    answer_from_message,
    sample_type,
    to_json,
)
from trainer.types import LearnerSettings, LossSpec, SaveStatus, TrainSample, ValueSample, add_sums
from trainer.workers.rank import Rank, RankDied, RankLost, RawAnswer
from trainer.workers.samples import by_gradient, by_sample, check_samples, set_logprobs
from trainer.workers.starting import open_meeting, spawn_ranks
from trainer.workers.watch import RankHangs, wait_for_answers

DEFAULT_HIDDEN_SIZE = 1024
"""Default for a config.json without it. It only balances the work of the ranks."""

FAILURE_SETTLES_S = 5.0
"""Time to wait, after a rank reports an error, for the death of another that may have caused it."""

R = TypeVar("R")
S = TypeVar("S", TrainSample, ValueSample)


class WorkerGroup:
    """The trainer's ranks. Commands run one at a time, in the order in which they were called."""

    def __init__(self, ranks: list[Rank], config: TrainerConfig, hidden_size: int) -> None:
        self._ranks = ranks
        self._config = config
        self._hidden_size = hidden_size
        self._lock = asyncio.Lock()
        self._in_flight: set[asyncio.Task[list[RawAnswer]]] = set()
        self._broken: AgentloopError | None = None

    @classmethod
    async def start(
        cls,
        *,
        model_path: str,
        config: TrainerConfig,
        dtype: str,
        total_steps: int,
        seed: int,
        log_dir: Path,
        reference: bool = False,
        init: Literal["weights", "random"] = "weights",
        trust_remote_code: bool = False,
        adapters: Path | None = None,
        launcher: Launcher | None = None,
    ) -> WorkerGroup:
        """Start the rank processes and load the model in each.

        Args:
            model_path: folder of a Hugging Face model, or a hub id.
            total_steps: optimizer steps of the whole run, for the schedule.
            log_dir: gets `trainer_rank{r}.log`.
            reference: keep a frozen copy of the initial policy, for `kl_coef`.
            init: `random` draws the weights with `seed`.
            trust_remote_code: `model.trust_remote_code`.
            adapters: checkpoint whose adapters the policy starts with; None: new ones.
            launcher: starts the processes; None: as children of this one.

        Raises:
            ModelError: the model cannot be loaded.
            RunDirError: `adapters` do not fit the model.
            WorkerError: a process died; the message ends with the last lines of its log.
        """
        settings = LearnerSettings(
            model_path=model_path,
            config=config,
            dtype=dtype,
            total_steps=total_steps,
            seed=seed,
            reference=reference,
            init=init,
            trust_remote_code=trust_remote_code,
            adapters=adapters.absolute() if adapters is not None else None,
        )
        log_dir.mkdir(parents=True, exist_ok=True)
        # The ranks meet at this file. One left by a killed run holds the addresses of dead ranks.
        store = (log_dir / ".ranks").absolute()
        store.unlink(missing_ok=True)

        ranks: list[Rank] = []

        launcher = launcher or LocalLauncher()
        group = cls(ranks, config, _hidden_size(model_path))
        try:
            await spawn_ranks(ranks, config, log_dir, launcher)
            starts = [Start(settings, rank.number, config.ranks, store) for rank in ranks]
            if not launcher.local:
                meeting = await open_meeting(ranks[0], config.timeout_s)
                starts = [Start(settings, rank.number, config.ranks, None, meeting) for rank in ranks]
            await group._send([(to_json(start), ()) for start in starts])
        except BaseException:
            await group.close()
            raise
        return group

    @property
    def address(self) -> str:
        """The address of rank 0, which broadcasts weights; empty: this machine's."""
        return self._ranks[0].address

    # -- training ----------------------------------------------------------------------------------

    async def accumulate(
        self,
        samples: Sequence[TrainSample],
        *,
        temperature: float,
        loss: LossSpec | None = None,
        keep_logprobs: bool = False,
    ) -> dict[str, float]:
        """Add the gradient of the summed loss of `samples` to the accumulated gradient.

        May be called any number of times before `step`. Calls of a few thousand tokens are as fast
        as one large call; smaller ones leave part of a core's speed unused. Groups whose advantages
        are all 0 have no backward pass where the loss has no other term; they count in all sums.

        Args:
            samples: samples with an equal `group_key` share their prompt.
            temperature: the one they were sampled with.
            loss: default: the loss of the config's `algorithm`.
            keep_logprobs: set the samples' `trainer_logprobs` to those of this forward pass.

        Returns:
            sums over the trained tokens: `loss_sum` (weighted by the aggregation), `entropy_sum`,
            `clip_sum`, `kl_ref_sum`, `logprob_abs_sum` (|trainer - engine| logprob), `k3_sum` (KL
            of engine against trainer), `weight_sum`, `weight_square_sum` and `weight_max` (trainer
            / engine probability) and `masked_sum` (tokens left out by the correction); counts:
            `tokens` (trained), `sequences`, `packed_tokens` (computed, shared prompts once),
            `micro_batches`, `normalizer` (add up over the calls of a step, then pass to `step`);
            `time_s` of the slowest rank. Merge calls with `types.add_sums`. Without
            `proximal_logprobs`, the mismatch sums compare like with like only before the first
            `step` of a version.

        Raises:
            ValueError: a sample's columns do not fit together, or the temperature is 0.
        """
        spec = loss or LossSpec.from_config(self._config.algorithm)
        check_samples(samples, temperature)
        trained = [sample for sample in samples if sample.loss_mask.any()]
        if not trained:
            return {"tokens": 0.0, "sequences": 0.0, "normalizer": 0.0}

        sums: dict[str, float] = {}
        for forward_only, part in enumerate(by_gradient(trained, spec)):
            if not part:
                continue
            command = Accumulate(temperature, spec, keep_logprobs, forward_only=bool(forward_only))
            shares, answers = await self._ask_with_samples(command, part)
            if keep_logprobs:
                for share, answer in zip(shares, answers, strict=True):
                    set_logprobs([part[index] for index in share], answer.logprobs)
            add_sums(sums, _merged([answer.sums for answer in answers]))
        return sums | {"normalizer": normalizer(trained, spec.aggregation, spec.aggregation_constant)}

    async def step(self, normalizer: float) -> dict[str, float]:
        """Take one optimizer step on the accumulated gradient divided by `normalizer`.

        Returns:
            `lr` and `grad_norm`.

        Raises:
            WorkerError: the gradient is not finite.
        """
        return await self.ask(Step(normalizer))

    async def reset_optimizer(self, optim: OptimConfig, total_steps: int) -> None:
        """Start the next stage of a training: empty moments, a schedule of `total_steps` at step
        0."""
        await self.ask(ResetOptimizer(optim, total_steps))

    async def logprobs(
        self, samples: Sequence[TrainSample], *, temperature: float, of: Literal["policy", "reference"] = "policy"
    ) -> list[np.ndarray]:
        """Compute the logprobs of the trained tokens under the policy, or under the initial policy.

        Returns:
            for each sample (L) float32, 0 where the mask is 0.

        Raises:
            WorkerError: there is no reference policy (`start(reference=True)`).
        """
        check_samples(samples, temperature)
        shares, answers = await self._ask_with_samples(Logprobs(temperature, of), samples)
        return by_sample(samples, shares, answers)

    async def values(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """Compute the critic's value of the state in which each trained token was sampled.

        Returns:
            for each sample (L) float32, 0 where the mask is 0.

        Raises:
            WorkerError: there is no critic.
        """
        shares, answers = await self._ask_with_samples(Values(), samples)
        return by_sample(samples, shares, answers)

    async def accumulate_values(self, samples: Sequence[ValueSample]) -> dict[str, float]:
        """Add the gradient of the critic's loss over trained tokens to its accumulated gradient.

        Returns:
            sums over the trained tokens: `value_loss_sum`, `value_clip_sum`, `value_sum`; `tokens`
            and `normalizer` (add up over the calls of a step); `time_s` of the slowest rank.
        """
        _, answers = await self._ask_with_samples(AccumulateValues(), samples)
        return _merged(answers) | {
            "tokens": float(sum(sample.trained_tokens for sample in samples)),
            "normalizer": normalizer(samples, "token_mean"),
        }

    async def step_critic(self, normalizer: float) -> dict[str, float]:
        """Take one optimizer step of the critic, as `step` does for the policy."""
        return await self.ask(StepCritic(normalizer))

    # -- weights and checkpoints -------------------------------------------------------------------

    async def publish(self, folder: Path) -> str:
        """Write the policy as a Hugging Face folder, which appears when it is complete.

        Returns:
            the checksum (`agentloop.weights.layout.checksum`).
        """
        return (await self.ask(PublishWeights("disk", {"folder": Path(folder).absolute()}))).checksum

    async def layout(self) -> PublishedLayout:
        """Return name, dtype and shape of each published tensor, in the order of broadcasts."""
        return await self.ask(Layout())

    async def save(
        self,
        folder: Path,
        state: dict[str, Any] | None = None,
        *,
        files: Mapping[str, Path] | None = None,
        wait: bool = True,
    ) -> None:
        """Write a checkpoint, whole or not at all: `trainer/`, `files` and `state.json` in
        `folder`.

        Args:
            files: by name in the folder, paths of files to move there.
            wait: False returns once the ranks have copied their state; then use `saved`.

        Raises:
            WorkerError: the checkpoint could not be written.
        """
        moved = {name: path.absolute() for name, path in (files or {}).items()}
        statuses = await self.ask_all(Save(Path(folder).absolute(), state or {}, wait, moved))
        if wait and (error := _save_error(statuses)):
            raise WorkerError(f"the checkpoint {folder} could not be written: {error}", "check that its disk has room")

    async def saved(self, *, wait: bool) -> tuple[bool, str]:
        """Report on the latest save.

        The folder does not exist until every rank has written its part.

        Args:
            wait: until the save has ended.

        Returns:
            whether it has ended, and why it failed (empty if it did not).
        """
        statuses = await self.ask_all(Saved(wait))
        if not wait and not all(status.done for status in statuses):
            return False, ""
        return True, _save_error(statuses)

    async def load(self, folder: Path, *, optimizer: bool = True) -> None:
        """Read the `trainer/` folder of a checkpoint that `save` wrote.

        Args:
            optimizer: False reads only the weights.

        Raises:
            RunDirError: not a checkpoint, or one of another model.
        """
        await self.ask(Load(Path(folder).absolute(), optimizer))

    async def close(self) -> None:
        """End the processes. Ranks that are busy or broken are killed."""
        if self._broken is not None or self._in_flight:
            for rank in self._ranks:
                rank.kill()
        await asyncio.gather(*self._in_flight, return_exceptions=True)
        await asyncio.gather(*(rank.end() for rank in self._ranks))

    # -- talking to the ranks ----------------------------------------------------------------------

    async def ask(self, command: Command[R]) -> R:
        """Run a command on all ranks and return rank 0's answer.

        Raises:
            WorkerError: a rank died or failed. The group is broken from then on.
            AgentloopError: another error that a rank reported, by its own type.
        """
        return (await self.ask_all(command))[0]

    async def ask_all(self, command: Command[R]) -> list[R]:
        """Run a command on all ranks and return each one's answer. Raises as `ask`."""
        answers = await self._send([(to_json(command), ())] * len(self._ranks))
        return [answer_from_message(command, *answer) for answer in answers]

    async def _ask_with_samples(
        self, command: SampleCommand[S, R], samples: Sequence[S]
    ) -> tuple[list[list[int]], list[R]]:
        """Run a command on all ranks, each on its share of the samples.

        Returns:
            by rank: indices of its samples, and its answer.
        """
        shares = split_over_ranks(samples, len(self._ranks), self._config.tokens_per_micro_batch, self._hidden_size)
        body, kind = to_json(command), sample_type(command)
        answers = await self._send(
            [(body, samples_to_arrays([samples[index] for index in share], kind)) for share in shares]
        )
        return shares, [answer_from_message(command, *answer) for answer in answers]

    async def _send(self, messages: Sequence[tuple[dict[str, Any], Sequence[np.ndarray]]]) -> list[RawAnswer]:
        """Send one message to each rank and return the answers.

        Cancelling the caller (Ctrl-C) does not interrupt the exchange: it completes, its answers
        are dropped, and the next command, which may be the `save` of the stopped run, waits for it.
        """
        task = asyncio.ensure_future(self._exchange(messages))
        self._in_flight.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[list[RawAnswer]]) -> None:
        self._in_flight.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, so that asyncio does not log it when the caller was cancelled

    async def _exchange(self, messages: Sequence[tuple[dict[str, Any], Sequence[np.ndarray]]]) -> list[RawAnswer]:
        async with self._lock:
            if self._broken is not None:
                kind = RankLost if isinstance(self._broken, RankLost) else WorkerError
                raise kind(f"the trainer failed earlier: {self._broken.message}", self._broken.hint)

            calls = [
                asyncio.ensure_future(rank.call(*message)) for rank, message in zip(self._ranks, messages, strict=True)
            ]
            try:
                operation = str(messages[0][0]["command"]) if messages else ""
                await wait_for_answers(self._ranks, calls, operation, self._config.timeout_s)
                return [call.result() for call in calls]
            except BaseException as first:
                exc = await _cause(first, calls)
                # The ranks may be at different collectives now, and wait for each other forever.
                self._broken = (
                    exc if isinstance(exc, AgentloopError) else WorkerError(f"a command was interrupted: {exc!r}")
                )
                for rank in self._ranks:
                    rank.kill()
                await asyncio.gather(*calls, return_exceptions=True)

                if exc is first:
                    raise
                raise exc from first


async def _cause(first: BaseException, calls: Sequence[asyncio.Future[RawAnswer]]) -> BaseException:
    """Return the death of a rank, if there is one, instead of an error that followed from it.

    A rank that loses its connection to a dead one often reports that before the death is noticed.
    """
    if not isinstance(first, WorkerError) or isinstance(first, (RankDied, RankHangs)):
        return first
    await asyncio.wait(calls, timeout=FAILURE_SETTLES_S)
    failures = [call.exception() for call in calls if call.done() and not call.cancelled()]
    return next((failure for failure in failures if isinstance(failure, RankDied)), first)


def _merged(answers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Merge the sums of the ranks; `time_s` is that of the slowest."""
    total: dict[str, float] = {}
    for answer in answers:
        add_sums(total, answer)
    return total | {"time_s": max(answer["time_s"] for answer in answers)}


def _save_error(statuses: Sequence[SaveStatus]) -> str:
    """Return the error of the first rank whose part failed."""
    return next((status.error for status in statuses if status.error), "")


def _hidden_size(model_path: str) -> int:
    """Return the hidden size of a model folder; a usual value for a hub id."""
    folder = ModelFolder(Path(model_path))
    return (folder.hidden_size if folder.has_config else None) or DEFAULT_HIDDEN_SIZE
