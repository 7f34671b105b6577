"""The critic's loss against plain float64 loops, its gradient against differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.learner.losses.value_loss import clipped_value_loss


def by_hand(value: float, old: float, target: float, cliprange: float | None) -> float:
    plain = (value - target) ** 2 / 2
    if cliprange is None:
        return plain
    near = min(max(value, old - cliprange), old + cliprange)
    return max(plain, (near - target) ** 2 / 2)


@pytest.mark.parametrize("cliprange", [None, 0.3])
def test_value_loss_golden_values_and_gradients(cliprange: float | None) -> None:
    rng = np.random.default_rng(0)
    value, old, target = rng.normal(size=100), rng.normal(size=100), rng.normal(size=100)
    values = torch.tensor(value, requires_grad=True)
    loss, active = clipped_value_loss(values, torch.tensor(old), torch.tensor(target), cliprange)
    assert loss.detach().numpy() == pytest.approx(
        [by_hand(*row, cliprange) for row in zip(value, old, target, strict=True)], rel=1e-12
    )
    loss.sum().backward()
    assert values.grad is not None
    h = 1e-6
    for i in range(100):
        up = by_hand(value[i] + h, old[i], target[i], cliprange)
        down = by_hand(value[i] - h, old[i], target[i], cliprange)
        assert values.grad[i].item() == pytest.approx((up - down) / (2 * h), abs=1e-6)
        assert not (active[i] and values.grad[i].item() != 0.0)
    assert active.any().item() is (cliprange is not None)
