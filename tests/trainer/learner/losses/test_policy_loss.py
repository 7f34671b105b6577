"""Policy losses against independent float64 computations: values by plain loops, gradients by differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from trainer.learner.losses.policy_loss import cispo, gspo, policy_gradient, ppo_clip
from trainer.learner.losses.ratios import Segments


def ppo_by_hand(lp: float, old: float, adv: float, low: float, high: float, dual: float | None) -> float:
    ratio = math.exp(lp - old)
    bounded = min(max(ratio, 1 - low), 1 + high)
    objective = min(ratio * adv, bounded * adv)
    if dual is not None and adv < 0:
        objective = max(objective, dual * adv)
    return -objective


@pytest.mark.parametrize("dual", [None, 3.0])
def test_ppo_clip_golden_values_and_gradients(dual: float | None) -> None:
    rng = np.random.default_rng(0)
    lp, old, adv = rng.normal(-2, 1.2, 200), rng.normal(-2, 1.2, 200), rng.normal(0, 1, 200)
    low, high = 0.2, 0.28
    logprobs = torch.tensor(lp, requires_grad=True)
    loss, active = ppo_clip(logprobs, torch.tensor(old), torch.tensor(adv), low, high, dual)
    expected = [ppo_by_hand(*row, low, high, dual) for row in zip(lp, old, adv, strict=True)]
    assert loss.detach().numpy() == pytest.approx(expected, rel=1e-12)
    loss.sum().backward()
    h = 1e-6
    for i in range(200):
        up = ppo_by_hand(lp[i] + h, old[i], adv[i], low, high, dual)
        down = ppo_by_hand(lp[i] - h, old[i], adv[i], low, high, dual)
        assert logprobs.grad[i].item() == pytest.approx((up - down) / (2 * h), abs=1e-5)
        assert active[i].item() == (logprobs.grad[i].item() == 0.0)


def test_an_absurd_ratio_stays_finite() -> None:
    loss, _ = ppo_clip(torch.tensor([0.0]), torch.tensor([-1e4]), torch.tensor([-1.0]), 0.2, 0.2)
    assert torch.isfinite(loss).all()


def test_policy_gradient_is_minus_advantage_times_logprob() -> None:
    assert policy_gradient(torch.tensor([-1.5]), torch.tensor([2.0])).item() == 3.0


SAMPLES = np.array([3, 3, 3, 0, 7, 7, 0, 0, 7, 3])
"""Which sample each token belongs to: numbers with gaps, samples not side by side."""


def gspo_by_hand(lp: list[float], old: list[float], adv: list[float], low: float, high: float) -> list[float]:
    """Equation 5: one ratio a sample, its loss at each of its tokens."""
    losses = []
    for n, sample in enumerate(SAMPLES):
        of = [i for i in range(len(lp)) if SAMPLES[i] == sample]
        ratio = math.exp(math.fsum(lp[i] - old[i] for i in of) / len(of))
        losses.append(-min(ratio * adv[n], min(max(ratio, 1 - low), 1 + high) * adv[n]))
    return losses


def slope(f: Callable[[list[float]], float], at: list[float], i: int) -> float:
    h = 1e-6
    up, down = list(at), list(at)
    up[i] += h
    down[i] -= h
    return (f(up) - f(down)) / (2 * h)


def test_gspo_golden_values_and_gradients() -> None:
    rng = np.random.default_rng(2)
    lp = rng.normal(-2, 0.4, 10).tolist()
    old = rng.normal(-2, 0.4, 10).tolist()
    of_sample = {3: 0.7, 0: -1.2, 7: 0.3}
    adv = [of_sample[sample] for sample in SAMPLES.tolist()]
    logprobs = torch.tensor(lp, dtype=torch.float64, requires_grad=True)
    segments = Segments.of(SAMPLES)
    loss, active = gspo(logprobs, torch.tensor(old), torch.tensor(adv), segments, 0.1, 0.15)
    assert loss.detach().numpy() == pytest.approx(gspo_by_hand(lp, old, adv, 0.1, 0.15), rel=1e-6)
    assert {bool(flag) for flag in active} == {True, False}, "the golden values see both sides of the bound"
    # Seen as sums over a sample of the mean over its tokens, as the paper's objective is.
    sizes = torch.tensor([int((sample == SAMPLES).sum()) for sample in SAMPLES])
    (loss / sizes).sum().backward()

    def objective(at: list[float]) -> float:
        return math.fsum(
            value / size for value, size in zip(gspo_by_hand(at, old, adv, 0.1, 0.15), sizes.tolist(), strict=True)
        )

    for i in range(10):
        assert logprobs.grad is not None
        assert logprobs.grad[i].item() == pytest.approx(slope(objective, lp, i), abs=1e-6)


def test_gspo_of_single_token_samples_is_ppo_clip() -> None:
    rng = np.random.default_rng(3)
    lp, old, adv = (torch.tensor(rng.normal(-2, 0.5, 50)) for _ in range(3))
    alone = gspo(lp, old, adv, Segments.of(np.arange(50)), 0.2, 0.28)
    for ours, theirs in zip(alone, ppo_clip(lp, old, adv, 0.2, 0.28), strict=True):
        assert torch.allclose(ours, theirs)


def test_cispo_clips_the_weight_and_keeps_every_gradient() -> None:
    rng = np.random.default_rng(4)
    lp, old, adv = rng.normal(-2, 1, 100), rng.normal(-2, 1, 100), rng.normal(0, 1, 100)
    logprobs = torch.tensor(lp, requires_grad=True)
    loss, active = cispo(logprobs, torch.tensor(old), torch.tensor(adv), 1.0, 0.5)
    weights = [min(max(math.exp(a - b), 0.0), 1.5) for a, b in zip(lp, old, strict=True)]
    assert loss.detach().numpy() == pytest.approx([-w * a * x for w, a, x in zip(weights, adv, lp, strict=True)])
    loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.numpy() == pytest.approx([-w * a for w, a in zip(weights, adv, strict=True)])
    assert active.tolist() == [math.exp(a - b) > 1.5 for a, b in zip(lp, old, strict=True)]
