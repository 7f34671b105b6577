"""One rank's model, optimizer and gradients: what the commands of the main process do.

All ranks run every method together: the order of collectives is the order of commands.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from agentloop.config import OptimConfig, TrainerConfig
from agentloop.errors import WorkerError
from trainer.attention import use_kernel
from trainer.checkpoint import load_checkpoint, load_model, save_checkpoint
from trainer.handout import Handout
from trainer.loading import load_sharded
from trainer.lora import without_adapters
from trainer.loss import k3, token_losses
from trainer.model import DeviceBatch, PolicyModel, is_vision, reshard
from trainer.optim import apply_settings, learning_rate, make_optimizer, scale_and_clip
from trainer.packing import PackedBatch, empty_batch, micro_batches, pack, plan_units
from trainer.types import LossSpec, TrainSample
from trainer.vision import ImageReader

SUMS = (
    "loss_sum",
    "entropy_sum",
    "clip_sum",
    "kl_ref_sum",
    "logprob_abs_sum",
    "k3_sum",
    "tokens",
    "sequences",
    "packed_tokens",
    "micro_batches",
)
"""What `accumulate` returns of one rank; the main process adds the ranks up."""


@dataclass(frozen=True, slots=True)
class LearnerSettings:
    """What a rank needs to know at its start."""

    model_path: str
    config: TrainerConfig
    dtype: str
    total_steps: int
    seed: int
    reference: bool = False
    init: Literal["weights", "random"] = "weights"


class Learner:
    """Owns the sharded policy, its optimizer and, for a KL term, the frozen policy the run started from."""

    def __init__(self, settings: LearnerSettings) -> None:
        config = settings.config
        torch.manual_seed(settings.seed)
        use_kernel(config.attention)
        self._settings = settings
        self._device = torch.device(config.device, dist.get_rank()) if config.device == "cuda" else torch.device("cpu")
        self._policy = self._load()
        self._images = ImageReader(self._policy.lm, settings.model_path) if is_vision(self._policy.lm) else None
        self.handout = Handout(self._policy.lm, settings.dtype)
        # With adapters the frozen policy is the model without them: no second copy.
        adapted = config.lora is not None
        self._reference = self._load(reference=True) if settings.reference and not adapted else None
        self.reset_optimizer(config.optim, settings.total_steps)

    def _load(self, *, reference: bool = False) -> PolicyModel:
        settings = self._settings
        return load_sharded(
            settings.model_path,
            settings.config,
            dtype=settings.dtype,
            init=settings.init,
            seed=settings.seed,
            device=self._device,
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
        batches = self._pack(samples, spec)
        sums = torch.zeros(len(SUMS), dtype=torch.float64)
        for number, batch in enumerate(batches, 1):
            # Ranks exchange gradients once per call, at its last micro-batch.
            self._policy.set_requires_gradient_sync(number == len(batches))
            sums += self._forward_backward(batch, temperature, spec)
        return dict(zip(SUMS, sums.tolist(), strict=True)) | {"time_s": time.perf_counter() - begin}

    def _forward_backward(self, packed: PackedBatch, temperature: float, spec: LossSpec) -> torch.Tensor:
        batch = DeviceBatch.of(packed, self._device)
        reference = self._reference_logprobs(batch, temperature) if spec.kl_coef else None
        logprobs, entropy = self._policy(batch, temperature)
        losses, detail = token_losses(spec, logprobs, entropy, batch.old_logprobs, batch.advantages, reference)
        loss = (losses * batch.loss_weights).sum()
        loss.backward()
        if not packed.sequences:
            return torch.zeros(len(SUMS), dtype=torch.float64)
        with torch.no_grad():
            columns = (
                losses * batch.loss_weights,
                entropy,
                detail["clip"],
                detail["kl_ref"],
                (logprobs - batch.old_logprobs).abs(),
                k3(batch.old_logprobs, logprobs),
            )
            summed = [column.double().sum() for column in columns]
        counts = (len(packed.targets), packed.sequences, len(packed.tokens), 1)
        return torch.cat([torch.stack(summed).cpu(), torch.tensor(counts, dtype=torch.float64)])

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
        norm = scale_and_clip(reshard(self._policy), normalizer, self._optim.grad_clip)
        if not np.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise WorkerError(
                f"the gradient of optimizer step {self._steps + 1} is not finite (norm {norm})",
                "lower trainer.optim.lr, and look for trajectories with absurd logprobs in the trace of this step",
            )
        rate = learning_rate(self._optim, self._steps, self._total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        return {"lr": rate, "grad_norm": norm}

    def logprobs(self, samples: Sequence[TrainSample], temperature: float) -> tuple[np.ndarray, ...]:
        """Recomputed logprobs of this rank's samples: `(sample_index, token_index, logprob)` columns."""
        columns: list[tuple[np.ndarray, ...]] = []
        with torch.no_grad():
            for packed in self._pack(samples, LossSpec()):
                logprobs, _ = self._policy(DeviceBatch.of(packed, self._device), temperature)
                if packed.sequences:
                    columns.append((packed.sample_index, packed.token_index, logprobs.cpu().numpy()))
        # Without a backward the root stays gathered, and its parameters are not those that the optimizer holds.
        self._policy.reshard()
        if not columns:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
        return tuple(np.concatenate(column) for column in zip(*columns, strict=True))

    def publish(self, folder: Path) -> str:
        """Write the policy as a Hugging Face folder; returns the checksum, on rank 0."""
        return self.handout.to_folder(folder)

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        save_checkpoint(folder, reshard(self._policy), self._optimizer, self._steps, state)

    def load(self, folder: Path, *, optimizer: bool) -> None:
        if not optimizer:
            load_model(folder, reshard(self._policy))
            return
        self._steps = load_checkpoint(folder, reshard(self._policy), self._optimizer)
        self._optimizer.zero_grad(set_to_none=True)
        apply_settings(self._optimizer, self._optim)  # what the recipe says now, not what it said when it was saved

    def _pack(self, samples: Sequence[TrainSample], spec: LossSpec) -> list[PackedBatch]:
        """This rank's micro-batches, as many as on the rank that has most: collectives have to match."""
        budget = self._settings.config.tokens_per_micro_batch
        plan = micro_batches(plan_units(samples, budget), budget)
        count = torch.tensor(len(plan), device=self._device)
        if dist.get_world_size() > 1:
            dist.all_reduce(count, dist.ReduceOp.MAX)
        packed = [pack(samples, units, spec.aggregation) for units in plan]
        packed += [empty_batch()] * (int(count) - len(packed))
        if self._images is not None:
            for batch, units in zip(packed, plan, strict=False):
                batch.images = self._images.attach(samples, units)
            for batch in packed[len(plan) :]:
                batch.images = self._images.blank(len(batch.tokens))
        return packed
