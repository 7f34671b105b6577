"""KL estimators and the adaptive coefficient against plain float64 computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trainer.algorithms.kl import KlCoefficient, KlKind, estimate, k3

LOGPROBS, OTHER = [-0.1, -2.0, -3.5, -1.0, -0.01], [-0.4, -1.0, -3.5, -9.0, -30.0]

BY_HAND = {
    "k1": [a - b for a, b in zip(LOGPROBS, OTHER, strict=True)],
    "k2": [(a - b) ** 2 / 2 for a, b in zip(LOGPROBS, OTHER, strict=True)],
    # The last log ratio is -29.99, bounded at -20.
    "k3": [
        math.exp(max(b - a, -20.0)) - max(b - a, -20.0) - 1 for a, b in zip(LOGPROBS, OTHER, strict=True)
    ],
}  # fmt: skip
BY_HAND["low_var_kl"] = [min(value, 10.0) for value in BY_HAND["k3"]]


@pytest.mark.parametrize("kind", list(BY_HAND))
def test_estimators_golden_values_in_numpy_and_torch(kind: KlKind) -> None:
    assert estimate(kind, np.array(LOGPROBS), np.array(OTHER)) == pytest.approx(BY_HAND[kind], rel=1e-12)
    ours = estimate(kind, torch.tensor(LOGPROBS).double(), torch.tensor(OTHER).double())
    assert ours.numpy() == pytest.approx(BY_HAND[kind], rel=1e-6)


def test_low_var_kl_has_no_gradient_where_it_is_clamped() -> None:
    logprobs = torch.tensor(LOGPROBS, dtype=torch.float64, requires_grad=True)
    estimate("low_var_kl", logprobs, torch.tensor(OTHER)).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[4].item() == 0.0
    assert logprobs.grad[1].item() == pytest.approx(1 - math.exp(1.0), rel=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind: KlKind) -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    values = estimate(kind, np.log(p), np.log(q))
    assert (p * values).sum() == pytest.approx((p * np.log(p / q)).sum(), rel=1e-12)


def test_k3_is_never_negative() -> None:
    rng = np.random.default_rng(0)
    assert (k3(rng.normal(size=1000), rng.normal(size=1000)) >= 0).all()


def test_the_coefficient_follows_the_target_within_bounds() -> None:
    fixed, led = KlCoefficient(0.2), KlCoefficient(0.2, target=0.1, gain=0.5)
    expected = 0.2
    for kl in (0.11, 0.3, 0.1, 0.02, 0.095):
        fixed.update(kl)
        led.update(kl)
        expected *= 1 + 0.5 * min(max((kl - 0.1) / 0.1, -0.2), 0.2)
        assert led.value == pytest.approx(expected, rel=1e-12)
    assert fixed.value == 0.2
    led.update(None)
    fixed.resume(0.7)
    assert fixed.value == 0.2, "what the recipe says now"
    resumed = KlCoefficient(0.2, target=0.1, gain=0.5)
    resumed.resume(led.value)
    assert resumed.value == led.value
    assert led.value == pytest.approx(expected, rel=1e-12)
