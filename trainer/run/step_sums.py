"""Sums over the minibatches of a step, and the means that the step reports."""

from __future__ import annotations

from typing import Any

from trainer.algorithms.ess import effective_sample_size
from trainer.types import add_sums


class StepSums:
    """Sums over a step's minibatches of the policy.

    The mismatch of engine and trainer comes from the first minibatch only: there the trainer still
    has the weights that sampled. In later minibatches the optimizer causes the difference, which
    shows in `train/clip_frac`.
    """

    def __init__(self) -> None:
        self._all: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._optimizer: list[dict[str, float]] = []

    def add(self, totals: dict[str, float], *, first: bool) -> None:
        """Add the sums of a minibatch; `first`: it is the step's first."""
        if first:
            self._first = totals
        add_sums(self._all, totals)

    def optimizer(self, metrics: dict[str, float]) -> None:
        """Add what an optimizer step returned."""
        self._optimizer.append(metrics)

    @property
    def kl_ref(self) -> float | None:
        """The mean KL to the reference, in nats per token; None if nothing was trained."""
        tokens = self._all.get("tokens", 0.0)
        return self._all["kl_ref_sum"] / tokens if tokens else None

    def metrics(self, train_s: float) -> dict[str, Any]:
        """Return the means of the step, which spent `train_s` seconds on training."""
        tokens = self._all.get("tokens", 0.0)
        first_tokens = self._first.get("tokens", 0.0)

        def mean(key: str) -> float | None:
            return self._all[key] / tokens if tokens else None

        def first_mean(key: str) -> float | None:
            return self._first[key] / first_tokens if first_tokens else None

        return {
            "train/tokens": int(self._all.get("packed_tokens", 0)),
            "train/tokens_per_s": self._all.get("packed_tokens", 0.0) / max(train_s, 1e-9),
            "train/loss": self._all["loss_sum"] / self._all["normalizer"] if tokens else None,
            "train/entropy": mean("entropy_sum"),
            "train/clip_frac": mean("clip_sum"),
            "train/kl_ref": self.kl_ref,
            "mismatch/logprob_abs_mean": first_mean("logprob_abs_sum"),
            "mismatch/k3": first_mean("k3_sum"),
            "mismatch/ess": effective_sample_size(self._first),
            "mismatch/weight_max": self._first.get("weight_max"),
            "mismatch/masked_frac": mean("masked_sum"),
            "train/grad_norm": max((m["grad_norm"] for m in self._optimizer), default=None),
            "train/lr": self._optimizer[-1]["lr"] if self._optimizer else None,
        }


class CriticSums:
    """Sums over a step's minibatches of the critic."""

    def __init__(self) -> None:
        self._all: dict[str, float] = {}
        self._steps: list[dict[str, float]] = []
        self.pending = 0.0
        """The normalizer of the next optimizer step; 0 if nothing is accumulated."""

    def add(self, sums: dict[str, float]) -> None:
        """Add what one `accumulate_values` returned."""
        add_sums(self._all, sums)
        self.pending += sums["normalizer"]

    def stepped(self, metrics: dict[str, float]) -> None:
        """Add what an optimizer step returned."""
        self._steps.append(metrics)
        self.pending = 0.0

    @property
    def metrics(self) -> dict[str, Any]:
        """The means of the step."""
        tokens = self._all.get("tokens", 0.0)
        return {
            "critic/loss": self._all["value_loss_sum"] / self._all["normalizer"] if tokens else None,
            "critic/clip_frac": self._all["value_clip_sum"] / tokens if tokens else None,
            "critic/grad_norm": max((m["grad_norm"] for m in self._steps), default=None),
            "critic/lr": self._steps[-1]["lr"] if self._steps else None,
        }
