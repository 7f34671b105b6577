"""Ratios of probabilities, by token and by sample.

Shapes: N trained tokens of a micro-batch, S samples. All tokens of a sample are in one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.algorithms import MAX_LOG_RATIO


@dataclass(frozen=True, slots=True)
class Segments:
    """The sample of each trained token: `index` int64 (N) in 0..count-1."""

    index: Tensor
    count: int

    @classmethod
    def of(cls, sample_index: np.ndarray, device: torch.device | str = "cpu") -> Segments:
        """Build from a micro-batch's `sample_index`, whose numbers may have gaps."""
        present, index = np.unique(sample_index, return_inverse=True)
        return cls(torch.from_numpy(index.reshape(-1)).to(device), len(present))

    def sum(self, values_N: Tensor) -> Tensor:
        """For each token the sum over its sample (N)."""
        sums_S = values_N.new_zeros(self.count).index_add(0, self.index, values_N)
        return sums_S[self.index]

    def mean(self, values_N: Tensor) -> Tensor:
        """For each token the mean over its sample (N)."""
        return self.sum(values_N) / self.sum(torch.ones_like(values_N))

    def any(self, flags_N: Tensor) -> Tensor:
        """For each token whether any token of its sample is flagged (N, bool)."""
        return self.sum(flags_N.float()) > 0


def bounded(log_ratio_N: Tensor) -> Tensor:
    """Clamp a log ratio to the range in which `exp` stays finite."""
    return log_ratio_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
