"""Advantages, losses and the schedule against independent float64 computations, written out with plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentloop.config import AlgorithmConfig, OptimConfig
from trainer.advantage import advantages, grpo_process
from trainer.loss import k3, policy_gradient, ppo_clip, token_losses
from trainer.optim import learning_rate
from trainer.types import LossSpec

REWARDS = [1.0, 0.0, 0.0, 0.5, 1.0]


def test_grpo_divides_by_the_sample_standard_deviation() -> None:
    mean = math.fsum(REWARDS) / 5
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in REWARDS) / 4)
    expected = [(r - mean) / (std + 1e-6) for r in REWARDS]
    assert advantages(np.array(REWARDS), "grpo") == pytest.approx(expected, abs=1e-12)


def test_dr_grpo_only_subtracts_the_mean() -> None:
    mean = math.fsum(REWARDS) / 5
    assert advantages(np.array(REWARDS), "dr_grpo") == pytest.approx([r - mean for r in REWARDS], abs=1e-12)


def test_rloo_subtracts_the_mean_of_the_others() -> None:
    expected = [r - (math.fsum(REWARDS) - r) / 4 for r in REWARDS]
    assert advantages(np.array(REWARDS), "rloo") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_equal_rewards_and_lone_episodes_teach_nothing(kind: str) -> None:
    assert advantages(np.array([1.0, 1.0, 1.0]), kind).tolist() == [0.0, 0.0, 0.0]  # type: ignore[arg-type]
    assert advantages(np.array([1.0]), kind).tolist() == [0.0]  # type: ignore[arg-type]


def test_bad_rewards_and_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        advantages(np.array([1.0, float("nan")]), "grpo")
    with pytest.raises(ValueError, match="known: dr_grpo, grpo, rloo"):
        advantages(np.array([1.0]), "ppo")  # type: ignore[arg-type]


def test_process_supervision_sums_the_normalized_rewards_ahead() -> None:
    # R = {1, 0, 1, 0, 0, 1}: mean 1/2, std sqrt(6 / 4 / 5); normalized +-0.9129
    one = 0.5 / (math.sqrt(0.3) + 1e-6)
    a, b, c = grpo_process([[1.0, 0.0, 1.0], [0.0], [0.0, 1.0]])
    assert a == pytest.approx([one, 0.0, one], abs=1e-12)
    assert b == pytest.approx([-one], abs=1e-12)
    assert c == pytest.approx([0.0, one], abs=1e-12)


def test_process_supervision_of_outcomes_alone_is_grpo() -> None:
    assert (
        np.concatenate(grpo_process([[r] for r in REWARDS])).tolist() == advantages(np.array(REWARDS), "grpo").tolist()
    )


STEPS = st.lists(st.lists(st.floats(-10, 10).map(lambda x: round(x, 2)), max_size=4), min_size=1, max_size=5)


@given(steps=STEPS, shift=st.integers(-100, 100))
def test_process_supervision_does_not_see_a_shift_of_all_rewards(steps: list[list[float]], shift: int) -> None:
    plain, shifted = grpo_process(steps), grpo_process([[r + shift for r in row] for row in steps])
    for a, b in zip(plain, shifted, strict=True):
        assert a == pytest.approx(b, abs=1e-6)


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5), reward=st.integers(-3, 3))
def test_equal_step_rewards_teach_nothing(sizes: list[int], reward: int) -> None:
    found = grpo_process([[float(reward)] * size for size in sizes])
    assert [len(steps) for steps in found] == sizes
    assert all(value == 0.0 for steps in found for value in steps)


def test_a_step_reward_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        grpo_process([[1.0], [float("inf")]])


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


def test_k3_is_the_estimator_of_the_other_direction_and_never_negative() -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    values = k3(torch.tensor(np.log(p)), torch.tensor(np.log(q))).numpy()
    assert (values >= 0).all()
    assert (p * values).sum() == pytest.approx((p * np.log(p / q)).sum(), rel=1e-12)  # exact in expectation


def test_policy_gradient_is_minus_advantage_times_logprob() -> None:
    assert policy_gradient(torch.tensor([-1.5]), torch.tensor([2.0])).item() == 3.0


def test_terms_of_the_loss_add_up() -> None:
    rng = np.random.default_rng(1)
    lp, old, adv, ref, ent = (torch.tensor(rng.normal(-2, 0.3, 50)) for _ in range(5))
    base, _ = token_losses(LossSpec(), lp, ent, old, adv, None)
    full, detail = token_losses(LossSpec(kl_coef=0.1, entropy_coef=0.01), lp, ent, old, adv, ref)
    d = ref.numpy() - lp.numpy()
    expected = base.numpy() + 0.1 * (np.exp(d) - d - 1) - 0.01 * ent.numpy()
    assert full.numpy() == pytest.approx(expected, rel=1e-12)
    assert detail["kl_ref"].numpy() == pytest.approx(np.exp(d) - d - 1, rel=1e-12)
    sft, _ = token_losses(LossSpec(kind="sft"), lp, ent, old, adv, None)
    assert torch.equal(sft, -lp)


def test_the_loss_is_what_the_config_says() -> None:
    config = AlgorithmConfig(loss="pg", clip_ratio_high=0.28, clip_ratio_c=3.0, kl_coef=0.1, entropy_coef=0.2)
    spec = LossSpec.from_config(config)
    assert (spec.kind, spec.clip_ratio_high, spec.clip_ratio_c, spec.kl_coef, spec.entropy_coef) == (
        "pg", 0.28, 3.0, 0.1, 0.2,
    )  # fmt: skip


def test_learning_rate_warms_up_and_ends_where_it_should() -> None:
    constant = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(constant, step, 100) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    linear = OptimConfig(lr=1.0, lr_end=0.0, schedule="linear")
    assert [learning_rate(linear, step, 5) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = OptimConfig(lr=1.0, lr_end=0.2, schedule="cosine", warmup_steps=1)
    values = [learning_rate(cosine, step, 6) for step in range(6)]
    assert values[1] == pytest.approx(1.0)
    assert values[3] == pytest.approx(0.6)
    assert values[5] == pytest.approx(0.2)
    assert learning_rate(cosine, 50, 6) == pytest.approx(0.2)
