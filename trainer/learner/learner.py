"""One rank's model, optimizer and gradients, behind the commands of the main process.

All ranks run every method together: the order of collectives is the order of commands.

Shapes: N trained tokens of a micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from agentloop.config import OptimConfig
from agentloop.errors import WorkerError
from trainer.checkpoint_files import TENSORS
from trainer.learner.checkpoint import CheckpointSaver, load_checkpoint, load_model
from trainer.learner.critic import Critic
from trainer.learner.loss import token_losses
from trainer.learner.losses.ratios import Segments
from trainer.learner.model.loading import load_sharded
from trainer.learner.model.lora import AdapterSnapshot, without_adapters
from trainer.learner.model.policy import DeviceBatch, PolicyModel, is_vision
from trainer.learner.model.sharding import move_model, reduce_gradients, reshard
from trainer.learner.model.vision import ImageReader
from trainer.learner.optim import apply_settings, make_optimizer, move_optimizer, set_zero_gradients, take_step
from trainer.learner.weights.publisher import WeightPublisher
from trainer.packing.layout import PackedBatch, empty_batch, pack
from trainer.packing.units import micro_batches, plan_units
from trainer.types import (
    Aggregation,
    LearnerSettings,
    LossSpec,
    Sample,
    TokenNumbers,
    TrainSample,
    ValueSample,
    add_sums,
)

TOKEN_SUMS = (
    "loss_sum",
    "entropy_sum",
    "clip_sum",
    "kl_ref_sum",
    "masked_sum",
    "logprob_abs_sum",
    "k3_sum",
    "weight_sum",
    "weight_square_sum",
)
"""Sums over a rank's trained tokens; the main process adds up the ranks."""

COUNTS = ("tokens", "sequences", "packed_tokens", "micro_batches")
"""Counts that `accumulate` also returns."""


class Learner:
    """Owns the sharded policy, its optimizer and, for a KL term, the frozen reference policy.

    The process group must exist.

    Raises:
        ConfigError: a kernel or package that the settings name is not installed.
        ModelError: the model cannot be loaded, or has a feature that the trainer does not compute.
        RunDirError: the adapters to start with do not fit the model.
    """

    def __init__(self, settings: LearnerSettings) -> None:
        config = settings.config
        torch.manual_seed(settings.seed)

        self._settings = settings
        self._reduce_each = config.fsdp.reduce_each_micro_batch
        self._device = torch.device(config.device, dist.get_rank()) if config.device == "cuda" else torch.device("cpu")

        self._policy = self._load()
        if settings.adapters is not None:
            load_model(settings.adapters / TENSORS, self._policy)
        self._images: ImageReader | None = None
        if is_vision(self._policy.lm):
            trust = settings.trust_remote_code
            self._images = ImageReader(self._policy.lm, settings.model_path, trust_remote_code=trust)
        self._saver = CheckpointSaver()
        self.publisher = WeightPublisher(self._policy.lm, settings.dtype)

        # With adapters the frozen policy is the model with those it started with: no second copy.
        adapted = config.lora is not None
        self._reference = self._load(reference=True) if settings.reference and not adapted else None
        kept = settings.reference and settings.adapters is not None
        self._first_adapters = AdapterSnapshot(self._policy.lm) if kept else None
        self._critic = Critic(settings, self._device) if config.critic is not None else None
        self.reset_optimizer(config.optim, settings.total_steps)

    @property
    def policy(self) -> PolicyModel:
        """This rank's shard of the policy."""
        return self._policy

    @property
    def reference(self) -> PolicyModel | None:
        """The frozen policy that the run started from; None without one, and with adapters."""
        return self._reference

    @property
    def optimizer(self) -> torch.optim.AdamW:
        """The policy's optimizer."""
        return self._optimizer

    @property
    def optim(self) -> OptimConfig:
        """The settings of the policy's optimizer."""
        return self._optim

    @property
    def steps(self) -> int:
        """Optimizer steps taken in the current schedule."""
        return self._steps

    @property
    def critic(self) -> Critic:
        """The critic.

        Raises:
            WorkerError: the run has none.
        """
        if self._critic is None:
            raise WorkerError("this run has no critic", "set trainer.critic and trainer.algorithm.advantage=gae")
        return self._critic

    def _load(self, *, reference: bool = False) -> PolicyModel:
        settings = self._settings
        return load_sharded(
            settings.model_path,
            settings.config,
            dtype=settings.dtype,
            init=settings.init,
            seed=settings.seed,
            device=self._device,
            kind=PolicyModel,
            reference=reference,
            trust_remote_code=settings.trust_remote_code,
        )

    def reset_optimizer(self, optim: OptimConfig, total_steps: int) -> None:
        """Reset the moments, and start a schedule of `total_steps` at its step 0."""
        self._optim = optim
        self._total_steps = total_steps
        self._optimizer = make_optimizer(reshard(self._policy), optim)
        self._steps = 0
        self._has_gradient = False

    def accumulate(
        self,
        samples: Sequence[TrainSample],
        temperature: float,
        spec: LossSpec,
        logprobs: list[TokenNumbers] | None = None,
        *,
        forward_only: bool = False,
    ) -> dict[str, float]:
        """Run forward and backward over this rank's share; gradients add up until `step`.

        Args:
            logprobs: gets the logprobs of each micro-batch's trained tokens, if it is given.
            forward_only: all advantages are 0, here and on the other ranks, and so is the gradient.

        Returns:
            `TOKEN_SUMS`, `COUNTS`, `weight_max` and `time_s`.
        """
        begin = time.perf_counter()
        batches = self._pack(samples, spec.aggregation)
        sums: dict[str, float] = {}

        for number, batch in enumerate(batches, 1):
            if forward_only:
                with torch.no_grad():
                    add_sums(sums, self._forward(samples, batch, temperature, spec, logprobs)[1])
                continue
            if not self._reduce_each:  # once per call: exchanges less, but each rank holds whole gradients until then
                reduce_gradients(self._policy, now=number == len(batches))
            loss, numbers = self._forward(samples, batch, temperature, spec, logprobs)
            loss.backward()
            add_sums(sums, numbers)

        if forward_only:
            reshard(self._policy)  # as in `_columns`
        else:
            self._has_gradient = True
        return sums | {"time_s": time.perf_counter() - begin}

    def _forward(
        self,
        samples: Sequence[TrainSample],
        packed: PackedBatch,
        temperature: float,
        spec: LossSpec,
        logprobs: list[TokenNumbers] | None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a micro-batch, and its sums."""
        batch = DeviceBatch.of(packed, self._device)
        reference_N = None
        if spec.kl_coef and self._settings.reference:
            reference_N = self._reference_logprobs(batch, temperature)

        logprobs_N, entropy_N = self._policy(batch, temperature)
        losses_N, detail = token_losses(
            spec,
            logprobs_N,
            entropy_N,
            batch.columns["old_logprobs"],
            batch.columns["advantages"],
            reference_N,
            Segments.of(packed.sample_index, self._device),
            self._proximal(samples, packed),
        )
        weighted_N = losses_N * batch.loss_weights
        loss = weighted_N.sum()
        if not packed.sequences:  # a rank without work only takes part in the collectives
            return loss, dict.fromkeys((*TOKEN_SUMS, *COUNTS, "weight_max"), 0.0)

        with torch.no_grad():
            columns = (
                weighted_N,
                entropy_N,
                detail["clip"],
                detail["kl_ref"],
                detail["masked"],
                detail["logprob_abs"],
                detail["k3"],
                detail["weight"],
                detail["weight"].double() ** 2,
            )
            summed = torch.stack([*(column.double().sum() for column in columns), detail["weight"].max().double()])

        if logprobs is not None:
            numbers = logprobs_N.detach().float().cpu().numpy()
            logprobs.append(TokenNumbers(packed.sample_index, packed.token_index, numbers))
        counts = (len(packed.targets), packed.sequences, len(packed.tokens), 1)
        names = (*TOKEN_SUMS, "weight_max", *COUNTS)
        return loss, dict(zip(names, [*summed.tolist(), *map(float, counts)], strict=True))

    def _proximal(self, samples: Sequence[TrainSample], packed: PackedBatch) -> Tensor | None:
        """Recomputed logprobs of the micro-batch's trained tokens (N); None if there are none."""
        if not packed.sequences or not samples or samples[0].proximal_logprobs is None:
            return None

        joined = np.concatenate([sample.proximal_logprobs for sample in samples])
        starts = np.cumsum([0] + [len(sample) for sample in samples])
        return torch.from_numpy(joined[starts[packed.sample_index] + packed.token_index]).to(self._device)

    def _logprobs(self, batch: DeviceBatch, temperature: float) -> Tensor:
        """Logprobs (N) of the policy."""
        logprobs_N: Tensor = self._policy(batch, temperature)[0]
        return logprobs_N

    def _reference_logprobs(self, batch: DeviceBatch, temperature: float) -> Tensor:
        """Logprobs (N) of the policy that the run started from, without a gradient."""
        with torch.no_grad():
            if self._reference is not None:
                logprobs_N: Tensor = self._reference(batch, temperature)[0]
                return logprobs_N
            if self._first_adapters is None:
                with without_adapters(self._policy.lm):
                    return self._logprobs(batch, temperature)

            # Gathered parameters are copies: freed, so that the pass reads the exchanged values,
            # and again, so that later passes read the policy's.
            with self._first_adapters.in_place_of(reshard(self._policy).lm):
                logprobs_N = self._logprobs(batch, temperature)
                reshard(self._policy)
            return logprobs_N

    def step(self, normalizer: float) -> dict[str, float]:
        """Divide the gradient by `normalizer`, clip it, take one AdamW step and reset the gradient.

        Returns:
            `lr`, and `grad_norm` before clipping.

        Raises:
            WorkerError: the gradient is not finite; the step is not taken.
        """
        policy = reshard(self._policy)
        if not self._has_gradient:
            set_zero_gradients(self._optimizer, first=self._steps == 0)
        self._has_gradient = False
        metrics = take_step(
            policy,
            self._optimizer,
            self._optim,
            normalizer=normalizer,
            done=self._steps,
            total=self._total_steps,
        )
        self._steps += 1
        return metrics

    def logprobs(
        self, samples: Sequence[Sample], temperature: float, of: Literal["policy", "reference"] = "policy"
    ) -> TokenNumbers:
        """Recompute the logprobs of this rank's samples under the policy or the reference.

        Raises:
            WorkerError: there is no reference policy.
        """
        if of == "policy":
            return self._columns(samples, lambda batch: self._logprobs(batch, temperature))
        if not self._settings.reference:
            raise WorkerError("this run has no reference policy", "start the ranks with reference=True")
        return self._columns(samples, lambda batch: self._reference_logprobs(batch, temperature))

    def values(self, samples: Sequence[Sample]) -> TokenNumbers:
        """Compute the critic's values of the states in which this rank's tokens were sampled.

        Raises:
            WorkerError: there is no critic.
        """
        columns = self._columns(samples, self.critic.model)
        reshard(self.critic.model)  # as in `_columns`
        return columns

    def accumulate_values(self, samples: Sequence[ValueSample]) -> dict[str, float]:
        """Run forward and backward of the critic over this rank's share."""
        return self.critic.accumulate(self._pack(samples, kind=ValueSample))

    def _columns(self, samples: Sequence[Sample], forward: Callable[[DeviceBatch], Tensor]) -> TokenNumbers:
        """Collect the results (N) of `forward` over all micro-batches, without a gradient."""
        columns: list[TokenNumbers] = []
        with torch.no_grad():
            for packed in self._pack(samples):
                numbers = forward(DeviceBatch.of(packed, self._device))
                if packed.sequences:
                    columns.append(TokenNumbers(packed.sample_index, packed.token_index, numbers.cpu().numpy()))

        # Without a backward pass the root stays gathered: its parameters are not those that the
        # optimizer holds.
        reshard(self._policy)
        if not columns:
            return TokenNumbers(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        return TokenNumbers(*(np.concatenate(column) for column in zip(*columns, strict=True)))

    def publish(self, folder: Path) -> str:
        """Write the policy as a Hugging Face folder; return the checksum, on rank 0."""
        return self.publisher.disk.publish(folder=folder).checksum

    def save(
        self, folder: Path, state: dict[str, Any], files: Mapping[str, str] | None = None, *, wait: bool = True
    ) -> dict[str, Any]:
        """Start saving a checkpoint, and with `wait` finish it; see `CheckpointSaver.finish`."""
        self._saver.begin(folder, reshard(self._policy), self._optimizer, self._steps, state, self._critic, files)
        return self._saver.finish(wait=wait)

    def saved(self, *, wait: bool) -> dict[str, Any]:
        """Return the state of the latest save; see `CheckpointSaver.finish`."""
        return self._saver.finish(wait=wait)

    def load(self, folder: Path, *, optimizer: bool) -> None:
        """Load a checkpoint: with `optimizer` the whole state, else the policy's weights.

        Raises:
            RunDirError: the folder is not a checkpoint of this model.
        """
        if not optimizer:
            load_model(folder, reshard(self._policy))
            return

        self._steps = load_checkpoint(folder, reshard(self._policy), self._optimizer, self._critic)
        self._optimizer.zero_grad(set_to_none=True)
        # The checkpoint's state includes its settings: restore the recipe's.
        apply_settings(self._optimizer, self._optim)

    def move_out(self, *, policy: bool) -> None:
        """Make room on the device for an engine: move state to host memory.

        Moved are optimizer states, the reference and the critic, and with `policy` its parameters;
        until then it can be published.
        """
        self._move(torch.device("cpu"), policy=policy)

    def move_in(self) -> None:
        """Move everything back to the device."""
        self._move(self._device, policy=True)

    def _move(self, device: torch.device, *, policy: bool) -> None:
        fsdp, kind = self._settings.config.fsdp, self._device.type
        # What FSDP keeps in host memory stays there.
        if not fsdp.offloads(reference=False, device=kind):
            move_optimizer(self._optimizer, device)
            if policy:
                move_model(self._policy, device)
            if self._critic is not None:
                self._critic.move(device)
        if self._reference is not None and not fsdp.offloads(reference=True, device=kind):
            move_model(self._reference, device)
        if kind == "cuda":
            torch.cuda.empty_cache()

    def _pack(
        self,
        samples: Sequence[Sample],
        aggregation: Aggregation = "token_mean",
        kind: type[Sample] = TrainSample,
    ) -> list[PackedBatch]:
        """Pack the samples into equally many micro-batches on all ranks: collectives must match."""
        budget = self._settings.config.tokens_per_micro_batch
        plan = micro_batches(plan_units(samples, budget), budget)
        count = torch.tensor(len(plan), device=self._device)
        if dist.get_world_size() > 1:
            dist.all_reduce(count, dist.ReduceOp.MAX)

        packed = [pack(samples, units, aggregation) for units in plan]
        packed += [empty_batch(kind)] * (int(count) - len(packed))

        if self._images is not None:
            for batch, units in zip(packed, plan, strict=False):
                batch.images = partial(self._images.attach, samples, units)
            for batch in packed[len(plan) :]:
                batch.images = partial(self._images.blank, len(batch.tokens))
        return packed
