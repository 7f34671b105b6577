"""The critic of `advantage: gae`: a second sharded model in each rank, with its own optimizer.

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
from trainer.learner.model.kernels import Kernels
from trainer.learner.model.loading import load_sharded
from trainer.learner.model.policy import DeviceBatch, PolicyModel
from trainer.learner.model.sharding import move_model, reduce_gradients, reshard
from trainer.learner.optim import apply_settings, make_optimizer, move_optimizer, take_step
from trainer.packing.layout import PackedBatch
from trainer.types import LearnerSettings, add_sums

SUMS = ("value_loss_sum", "value_clip_sum", "value_sum")


class ValueModel(PolicyModel):
    """The policy's backbone with a scalar head in place of the vocabulary head."""

    def __init__(self, lm: Any, logprob_chunk: int, kernels: Kernels) -> None:
        super().__init__(lm, logprob_chunk, kernels)
        head = lm.get_output_embeddings()
        if head.weight is not lm.get_input_embeddings().weight:
            head.requires_grad_(False)  # the forward does not use it, so it would never get a gradient
        self.value_head = nn.Linear(head.weight.shape[1], 1, bias=False, device="meta")

    # The policy's forward takes a temperature and returns two tensors; the critic has neither.
    def forward(self, batch: DeviceBatch) -> Tensor:  # type: ignore[override]
        """Return the value of the state in which each trained token was sampled, (N) float32."""
        values_N1: Tensor = self.value_head(self.hidden(batch)[batch.predict_from])
        # `sum` rather than `squeeze`: FSDP2 does not accept a view as the output.
        return values_N1.sum(-1).float()


class Critic:
    """A rank's shard of the value model, with its optimizer. `config.critic` must be set."""

    def __init__(self, settings: LearnerSettings, device: torch.device) -> None:
        config = settings.config
        assert config.critic is not None

        self._config = config.critic
        self._reduce_each = config.fsdp.reduce_each_micro_batch
        # The critic also takes steps during the warm-up, in which the policy takes none.
        self._total_steps = settings.total_steps + config.critic_warmup * config.algorithm.minibatches
        self._device = device

        self.model = load_sharded(
            settings.model_path,
            config,
            dtype=settings.dtype,
            init=settings.init,
            seed=settings.seed,
            device=device,
            kind=ValueModel,
            trust_remote_code=settings.trust_remote_code,
        )
        # Zero weights: an untrained critic predicts 0 everywhere, the same on every rank.
        nn.init.zeros_(self.model.value_head.weight)
        self.optimizer = make_optimizer(self.model, self._config.optim)
        self.steps = 0

    def accumulate(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """Run forward and backward over packed `ValueSample`s; gradients add up until `step`.

        Returns:
            `SUMS` over the trained tokens, and `time_s`.
        """
        begin = time.perf_counter()
        sums: dict[str, float] = {}
        for number, packed in enumerate(batches, 1):
            if not self._reduce_each:
                reduce_gradients(self.model, now=number == len(batches))
            batch = DeviceBatch.of(packed, self._device)

            values_N = self.model(batch)
            losses_N, active_N = clipped_value_loss(
                values_N, batch.columns["values"], batch.columns["returns"], self._config.cliprange_value
            )
            weighted_N = losses_N * batch.loss_weights
            total: Any = weighted_N.sum()  # Any: torch does not annotate Tensor.backward
            total.backward()

            found = [float(column.double().sum()) for column in (weighted_N.detach(), active_N, values_N.detach())]
            if not packed.sequences:  # the placeholder of a rank without work
                found = [0.0] * len(SUMS)
            add_sums(sums, dict(zip(SUMS, found, strict=True)))
        return sums | {"time_s": time.perf_counter() - begin}

    def step(self, normalizer: float) -> dict[str, float]:
        """Take one optimizer step, as `Learner.step` does."""
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

    def move(self, device: torch.device) -> None:
        """Move parameters and optimizer state; see `Learner.move_out`."""
        move_model(self.model, device)
        move_optimizer(self.optimizer, device)

    def restore(self, model_state: dict[str, Any], optimizer_state: dict[str, Any], steps: int) -> None:
        """Load the state of a checkpoint; keep the optimizer settings of the recipe."""
        set_state_dict(
            reshard(self.model), self.optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
        )
        self.optimizer.zero_grad(set_to_none=True)
        # The checkpoint's state includes its settings: restore the recipe's.
        apply_settings(self.optimizer, self._config.optim)
        self.steps = steps
