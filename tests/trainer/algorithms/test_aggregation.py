"""Aggregation against the formulas written over whole sequences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.algorithms.aggregation import normalizer, token_weight
from trainer.types import Aggregation, TrainSample

LOSSES = [[0.5, 1.0, -2.0], [3.0], [0.25, 0.75]]
WEIGHTS = [1.0, 0.5, 0.5]


def sample(trained: int, weight: float) -> TrainSample:
    """One prompt token, `trained` trained ones and one of tool output."""
    mask = np.array([False] + [True] * trained + [False])
    zeros = np.zeros(len(mask), dtype=np.float32)
    return TrainSample(np.zeros(len(mask), dtype=np.int64), mask, zeros, zeros, 1, 0, weight)


TOKENS = math.fsum(w * len(column) for w, column in zip(WEIGHTS, LOSSES, strict=True))
SUMS = [math.fsum(column) for column in LOSSES]
EXPECTED = {
    "token_mean": math.fsum(w * s for w, s in zip(WEIGHTS, SUMS, strict=True)) / TOKENS,
    "seq_mean_token_sum": math.fsum(w * s for w, s in zip(WEIGHTS, SUMS, strict=True)) / 2.0,
    "seq_mean_token_mean": math.fsum(
        w * math.fsum(column) / len(column) for w, column in zip(WEIGHTS, LOSSES, strict=True)
    ) / 2.0,
    "constant": math.fsum(w * s / 256 for w, s in zip(WEIGHTS, SUMS, strict=True)) / 2.0,
}  # fmt: skip


@pytest.mark.parametrize("aggregation", list(EXPECTED))
def test_aggregation_golden_values(aggregation: Aggregation) -> None:
    samples = [sample(len(column), weight) for column, weight in zip(LOSSES, WEIGHTS, strict=True)]
    weighted = math.fsum(
        token_weight(s.weight, s.trained_tokens, aggregation) * loss
        for s, column in zip(samples, LOSSES, strict=True)
        for loss in column
    )
    assert weighted / normalizer(samples, aggregation, 256) == pytest.approx(EXPECTED[aggregation], rel=1e-12)


@pytest.mark.parametrize("aggregation", list(EXPECTED))
def test_a_sample_without_a_trained_token_counts_nothing(aggregation: Aggregation) -> None:
    samples = [sample(2, 1.0), sample(0, 1.0)]
    assert normalizer(samples, aggregation, 8.0) == normalizer(samples[:1], aggregation, 8.0)
    assert normalizer([], aggregation, 8.0) == 1.0
