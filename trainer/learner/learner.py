"""One rank's model, optimizer and gradients: what the commands of the main process do.

All ranks run every method together: the order of collectives is the order of commands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from agentloop.config import OptimConfig
from agentloop.errors import WorkerError
from trainer.learner.checkpoint import CheckpointSaver, load_checkpoint, load_model
from trainer.learner.critic import Critic
from trainer.learner.loss import token_losses
from trainer.learner.losses.ratios import Segments
from trainer.learner.model.loading import load_sharded
from trainer.learner.model.lora import without_adapters
from trainer.learner.model.policy import DeviceBatch, PolicyModel, is_vision
from trainer.learner.model.sharding import reduce_gradients, reshard
from trainer.learner.model.vision import ImageReader
from trainer.learner.optim import apply_settings, make_optimizer, take_step
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
"""What `accumulate` returns of one rank, beside counts and `weight_max`; the main process puts the ranks together."""

COUNTS = ("tokens", "sequences", "packed_tokens", "micro_batches")


class Learner:
    """Owns the sharded policy, its optimizer and, for a KL term, the frozen policy the run started from."""

    def __init__(self, settings: LearnerSettings) -> None:
        config = settings.config
        torch.manual_seed(settings.seed)
        self._settings = settings
        self._reduce_each = config.fsdp.reduce_each_micro_batch
        self._device = torch.device(config.device, dist.get_rank()) if config.device == "cuda" else torch.device("cpu")
        self._policy = self._load()
        self._images = ImageReader(self._policy.lm, settings.model_path) if is_vision(self._policy.lm) else None
        self._saver = CheckpointSaver()
        self.publisher = WeightPublisher(self._policy.lm, settings.dtype)
        # With adapters the frozen policy is the model without them: no second copy.
        adapted = config.lora is not None
        self._reference = self._load(reference=True) if settings.reference and not adapted else None
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
        """The value model of a run that has one.

        Raises:
            WorkerError: it has none.
        """
        if self._critic is None:
            raise WorkerError("there is no critic in this run", "set trainer.critic and advantage=gae")
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
        )

    def reset_optimizer(self, optim: OptimConfig, total_steps: int) -> None:
        """Forget the moments and start a schedule of `total_steps` at its step 0."""
        self._optim = optim
        self._total_steps = total_steps
        self._optimizer = make_optimizer(reshard(self._policy), optim)
        self._steps = 0

    def accumulate(self, samples: Sequence[TrainSample], temperature: float, spec: LossSpec) -> dict[str, float]:
        """Forward and backward over this rank's share; gradients add up, undivided, until `step`."""
        begin = time.perf_counter()
        batches = self._pack(samples, spec.aggregation)
        sums: dict[str, float] = {}
        for number, batch in enumerate(batches, 1):
            if not self._reduce_each:
                reduce_gradients(self._policy, now=number == len(batches))
            add_sums(sums, self._forward_backward(samples, batch, temperature, spec))
        return sums | {"time_s": time.perf_counter() - begin}

    def _forward_backward(
        self, samples: Sequence[TrainSample], packed: PackedBatch, temperature: float, spec: LossSpec
    ) -> dict[str, float]:
        batch = DeviceBatch.of(packed, self._device)
        reference = self._reference_logprobs(batch, temperature) if spec.kl_coef else None
        logprobs, entropy = self._policy(batch, temperature)
        losses, detail = token_losses(
            spec,
            logprobs,
            entropy,
            batch.columns["old_logprobs"],
            batch.columns["advantages"],
            reference,
            Segments.of(packed.sample_index, self._device),
            self._proximal(samples, packed),
        )
        weighted = losses * batch.loss_weights
        weighted.sum().backward()
        if not packed.sequences:
            return dict.fromkeys((*TOKEN_SUMS, *COUNTS, "weight_max"), 0.0)
        with torch.no_grad():
            columns = (
                weighted,
                entropy,
                detail["clip"],
                detail["kl_ref"],
                detail["masked"],
                detail["logprob_abs"],
                detail["k3"],
                detail["weight"],
                detail["weight"].double() ** 2,
            )
            summed = torch.stack([*(column.double().sum() for column in columns), detail["weight"].max().double()])
        counts = (len(packed.targets), packed.sequences, len(packed.tokens), 1)
        names = (*TOKEN_SUMS, "weight_max", *COUNTS)
        return dict(zip(names, [*summed.tolist(), *map(float, counts)], strict=True))

    def _proximal(self, samples: Sequence[TrainSample], packed: PackedBatch) -> torch.Tensor | None:
        """The recomputed logprobs of the micro-batch's trained tokens, where the run has them; (N)."""
        if not packed.sequences or not samples or samples[0].proximal_logprobs is None:
            return None
        joined = np.concatenate([sample.proximal_logprobs for sample in samples])
        starts = np.cumsum([0] + [len(sample) for sample in samples])
        return torch.from_numpy(joined[starts[packed.sample_index] + packed.token_index]).to(self._device)

    def _reference_logprobs(self, batch: DeviceBatch, temperature: float) -> torch.Tensor | None:
        """Logprobs of the policy that the run started from; None when the run keeps none."""
        if not self._settings.reference:
            return None
        with torch.no_grad():
            if self._reference is not None:
                return self._reference(batch, temperature)[0]
            with without_adapters(self._policy.lm):
                return self._policy(batch, temperature)[0]

    def step(self, normalizer: float) -> dict[str, float]:
        """Divide the gradient, clip it, take one AdamW step and forget the gradient.

        Raises:
            WorkerError: the gradient is not finite; the step is not taken.
        """
        metrics = take_step(
            reshard(self._policy),
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
        """Recomputed logprobs of this rank's samples: `(sample_index, token_index, logprob)` columns."""
        if of == "policy":
            return self._columns(samples, lambda batch: self._policy(batch, temperature)[0])
        if not self._settings.reference:
            raise WorkerError("there is no reference policy in this run", "start the ranks with reference=True")
        return self._columns(samples, lambda batch: self._reference_logprobs(batch, temperature))

    def values(self, samples: Sequence[Sample]) -> TokenNumbers:
        """The critic's values of the states in which this rank's tokens were sampled, as `logprobs`."""
        columns = self._columns(samples, self.critic.model)
        reshard(self.critic.model)  # as in `_columns`
        return columns

    def accumulate_values(self, samples: Sequence[ValueSample]) -> dict[str, float]:
        """`accumulate` for the critic."""
        return self.critic.accumulate(self._pack(samples, kind=ValueSample))

    def _columns(self, samples: Sequence[Sample], forward: Callable[[DeviceBatch], torch.Tensor]) -> TokenNumbers:
        """What `forward` gives for each trained token, without a gradient: `(sample_index, token_index, number)`."""
        columns: list[TokenNumbers] = []
        with torch.no_grad():
            for packed in self._pack(samples):
                numbers = forward(DeviceBatch.of(packed, self._device))
                if packed.sequences:
                    columns.append(TokenNumbers(packed.sample_index, packed.token_index, numbers.cpu().numpy()))
        # Without a backward the root stays gathered, and its parameters are not those that the optimizer holds.
        reshard(self._policy)
        if not columns:
            return TokenNumbers(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        return TokenNumbers(*(np.concatenate(column) for column in zip(*columns, strict=True)))

    def publish(self, folder: Path) -> str:
        """Write the policy as a Hugging Face folder; returns the checksum, on rank 0."""
        return self.publisher.disk.publish(folder=folder).checksum

    def save(
        self, folder: Path, state: dict[str, Any], files: Mapping[str, str] | None = None, *, wait: bool = True
    ) -> dict[str, Any]:
        """Begin to save, and with `wait` finish it; what `CheckpointSaver.finish` returns."""
        self._saver.begin(folder, reshard(self._policy), self._optimizer, self._steps, state, self._critic, files)
        return self._saver.finish(wait=wait)

    def saved(self, *, wait: bool) -> dict[str, Any]:
        """How the save that was begun stands."""
        return self._saver.finish(wait=wait)

    def load(self, folder: Path, *, optimizer: bool) -> None:
        if not optimizer:
            load_model(folder, reshard(self._policy))
            return
        self._steps = load_checkpoint(folder, reshard(self._policy), self._optimizer, self._critic)
        self._optimizer.zero_grad(set_to_none=True)
        apply_settings(self._optimizer, self._optim)  # what the recipe says now, not what it said when it was saved

    def _pack(
        self,
        samples: Sequence[Sample],
        aggregation: Aggregation = "token_mean",
        kind: type[Sample] = TrainSample,
    ) -> list[PackedBatch]:
        """This rank's micro-batches, as many as on the rank that has most: collectives have to match."""
        budget = self._settings.config.tokens_per_micro_batch
        plan = micro_batches(plan_units(samples, budget), budget)
        count = torch.tensor(len(plan), device=self._device)
        if dist.get_world_size() > 1:
            dist.all_reduce(count, dist.ReduceOp.MAX)
        packed = [pack(samples, units, aggregation) for units in plan]
        packed += [empty_batch(kind)] * (int(count) - len(packed))
        if self._images is not None:
            for batch, units in zip(packed, plan, strict=False):
                batch.images = self._images.attach(samples, units)
            for batch in packed[len(plan) :]:
                batch.images = self._images.blank(len(batch.tokens))
        return packed
