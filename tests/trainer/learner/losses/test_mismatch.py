"""Corrections of the mismatch between engine and trainer, against plain float64 loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from trainer.algorithms.ess import effective_sample_size
from trainer.learner.losses.mismatch import correction
from trainer.learner.losses.ratios import Segments
from trainer.types import LossSpec

SAMPLES = np.array([5, 5, 5, 2, 2, 9, 9, 9, 9, 4])
LOG_RATIOS = [0.02, -0.01, 0.005, 1.7, -0.2, 0.3, -9.0, 0.1, 0.0, -0.75]

OF_SAMPLE = {
    sample: [d for d, s in zip(LOG_RATIOS, SAMPLES.tolist(), strict=True) if s == sample] for sample in {5, 2, 9, 4}
}


def by_hand(spec: LossSpec) -> tuple[list[float], list[bool]]:
    factors, kept = [], []
    for d, sample in zip(LOG_RATIOS, SAMPLES.tolist(), strict=True):
        own = OF_SAMPLE[sample]
        ratio, mean = math.exp(d), math.exp(math.fsum(own) / len(own))
        keep = True
        if spec.mask != "none":
            keep = spec.mask_low <= (ratio if spec.mask == "token" else mean) <= spec.mask_high
        if spec.veto is not None:
            keep = keep and min(math.exp(x) for x in own) >= spec.veto
        weight = {"none": 1.0, "token": ratio, "sequence": math.exp(math.fsum(own))}[spec.importance]
        if spec.importance_cap is not None and spec.importance != "none":
            weight = min(weight, spec.importance_cap)
        factors.append(weight if keep else 0.0)
        kept.append(keep)
    return factors, kept


@pytest.mark.parametrize(
    "choice",
    [
        {"importance": "token"},
        {"importance": "token", "importance_cap": 2.0},
        {"importance": "sequence"},
        {"importance": "sequence", "importance_cap": 2.0},
        {"importance": "token", "mask": "token", "mask_low": 0.5, "mask_high": 5.0},  # IcePop
        {"mask": "geometric", "mask_low": 0.99, "mask_high": 1.01},
        {"mask": "geometric", "mask_low": 0.2, "mask_high": 3.0, "importance": "token", "importance_cap": 2.0},
        {"veto": 1e-3},
        {"veto": 1e-3, "mask": "token", "mask_low": 0.5, "mask_high": 5.0, "importance": "sequence"},
    ],
)
def test_corrections_golden_values(choice: dict[str, Any]) -> None:
    spec = LossSpec(**choice)
    factors, kept = correction(spec, torch.tensor(LOG_RATIOS, dtype=torch.float64), Segments.of(SAMPLES))
    expected_factors, expected_kept = by_hand(spec)
    assert factors.numpy() == pytest.approx(expected_factors, rel=1e-9)
    assert kept.tolist() == expected_kept
    if spec.mask != "none" or spec.veto:
        assert set(expected_kept) == {True, False}, "the golden values see both"


def test_without_a_choice_nothing_changes() -> None:
    factors, kept = correction(LossSpec(), torch.tensor(LOG_RATIOS), Segments.of(SAMPLES))
    assert factors.tolist() == [1.0] * 10 and all(kept.tolist())


def test_absurd_ratios_stay_finite() -> None:
    spec = LossSpec(importance="sequence")
    factors, _ = correction(spec, torch.tensor([500.0, -500.0, 90.0]), Segments.of(np.array([0, 1, 2])))
    assert torch.isfinite(factors).all()


def test_the_effective_sample_size_is_one_for_equal_policies_and_small_for_a_dominant_weight() -> None:
    def share(weights: list[float]) -> float | None:
        sums = {"weight_sum": sum(weights), "weight_square_sum": sum(w * w for w in weights), "tokens": len(weights)}
        return effective_sample_size(sums)

    assert share([1.0] * 7) == pytest.approx(1.0)
    assert share([1.0, 2.0, 3.0]) == pytest.approx(36 / (3 * 14))
    assert share([1000.0] + [0.0] * 9) == pytest.approx(0.1)
    assert effective_sample_size({}) is None
