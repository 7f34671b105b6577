"""The critic of `advantage: gae`: a second sharded model in each rank, with an optimizer of its own.

Shapes: N trained tokens, E hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import set_state_dict

from trainer.learner.losses.value_loss import clipped_value_loss
from trainer.learner.model.loading import load_sharded
from trainer.learner.model.policy import DeviceBatch, PolicyModel, reshard
from trainer.learner.optim import apply_settings, make_optimizer, take_step
from trainer.packing.layout import PackedBatch
from trainer.types import LearnerSettings, add_sums

SUMS = ("value_loss_sum", "value_clip_sum", "value_sum")


class ValueModel(PolicyModel):
    """The policy's backbone with one number in place of its vocabulary."""

    def __init__(self, lm: nn.Module, logprob_chunk: int) -> None:
        super().__init__(lm, logprob_chunk)
        head = lm.get_output_embeddings()
        if head.weight is not lm.get_input_embeddings().weight:
            head.requires_grad_(False)  # it is not computed, and would never get a gradient
        self.value_head = nn.Linear(head.weight.shape[1], 1, bias=False, device="meta")

    def forward(self, batch: DeviceBatch) -> Tensor:  # type: ignore[override]
        """The value of the state in which each trained token was sampled, (N) float32."""
        values_N1 = self.value_head(self.hidden(batch)[batch.predict_from])
        return values_N1.sum(-1).float()  # a sum, because FSDP2 minds views


class Critic:
    """A rank's share of the value model. `config.critic` has to be set."""

    def __init__(self, settings: LearnerSettings, device: torch.device) -> None:
        config = settings.config
        assert config.critic is not None
        self._config = config.critic
        self._reduce_each = config.fsdp.reduce_each_micro_batch
        # The policy takes its steps after the warm-up, the critic during it too.
        self._total_steps = settings.total_steps + config.critic_warmup * config.algorithm.minibatches
        self._device = device
        model = load_sharded(
            settings.model_path,
            config,
            dtype=settings.dtype,
            init=settings.init,
            seed=settings.seed,
            device=device,
            kind=ValueModel,
        )
        # Zero: before its first step a critic knows nothing, and says the same on every rank.
        nn.init.zeros_(model.value_head.weight)
        self.model = model
        self.optimizer = make_optimizer(self.model, self._config.optim)
        self.steps = 0

    def accumulate(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """Forward and backward; gradients add up until `step`. In the batches stand values and returns."""
        begin = time.perf_counter()
        sums: dict[str, float] = {}
        for number, packed in enumerate(batches, 1):
            if not self._reduce_each:
                self.model.set_requires_gradient_sync(number == len(batches))
            batch = DeviceBatch.of(packed, self._device)
            values_N = self.model(batch)
            losses_N, active_N = clipped_value_loss(
                values_N, batch.old_logprobs, batch.advantages, self._config.cliprange_value
            )
            weighted_N = losses_N * batch.loss_weights
            weighted_N.sum().backward()
            found = [float(column.double().sum()) for column in (weighted_N.detach(), active_N, values_N.detach())]
            if not packed.sequences:
                found = [0.0] * len(SUMS)
            add_sums(sums, dict(zip(SUMS, found, strict=True)))
        return sums | {"time_s": time.perf_counter() - begin}

    def step(self, normalizer: float) -> dict[str, float]:
        """One optimizer step; as `Learner.step`."""
        metrics = take_step(
            reshard(self.model),
            self.optimizer,
            self._config.optim,
            normalizer=normalizer,
            done=self.steps,
            total=self._total_steps,
        )
        self.steps += 1
        return metrics

    def restore(self, model_state: dict[str, Any], optimizer_state: dict[str, Any], steps: int) -> None:
        """Take over what a checkpoint holds; the recipe's optimizer settings stay."""
        set_state_dict(
            reshard(self.model), self.optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
        )
        self.optimizer.zero_grad(set_to_none=True)
        apply_settings(self.optimizer, self._config.optim)
        self.steps = steps
