"""Advantages against independent float64 computations, written out with plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.algorithms.advantage import advantages, discounted_returns, gae, grpo_process, remax, whiten

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


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"])
def test_equal_rewards_and_lone_episodes_teach_nothing(kind: str) -> None:
    assert advantages(np.array([1.0, 1.0, 1.0]), kind).tolist() == [0.0, 0.0, 0.0]  # type: ignore[arg-type]
    assert advantages(np.array([1.0]), kind).tolist() == [0.0]  # type: ignore[arg-type]


def test_bad_rewards_and_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        advantages(np.array([1.0, float("nan")]), "grpo")
    with pytest.raises(ValueError, match="use one of dr_grpo, grpo, reinforce_pp_baseline, rloo"):
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


def test_remax_subtracts_the_reward_of_the_greedy_episode() -> None:
    assert remax(np.array(REWARDS), 0.25).tolist() == [r - 0.25 for r in REWARDS]


def test_the_baseline_form_of_reinforce_pp_subtracts_the_mean_of_the_group() -> None:
    mean = math.fsum(REWARDS) / 5
    found = advantages(np.array(REWARDS), "reinforce_pp_baseline")
    assert found == pytest.approx([r - mean for r in REWARDS], abs=1e-12)


def gae_by_hand(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Equation 16 as it stands: a sum over all later temporal differences, not a recursion."""
    ends = [*values[1:], 0.0]
    deltas = [r + gamma * v_next - v for r, v_next, v in zip(rewards, ends, values, strict=True)]
    return [
        math.fsum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(rewards))) for t in range(len(rewards))
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (0.5, 1.0)])
def test_gae_golden_values(gamma: float, lam: float) -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=40), rng.normal(size=40)
    expected = gae_by_hand(rewards.tolist(), values.tolist(), gamma, lam)
    assert gae(rewards, values, gamma, lam) == pytest.approx(expected, abs=1e-10)


def test_gae_of_lambda_one_plus_the_values_is_the_return() -> None:
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=20), rng.normal(size=20)
    assert gae(rewards, values, 0.97, 1.0) + values == pytest.approx(discounted_returns(rewards, 0.97), abs=1e-10)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_returns_golden_values(gamma: float) -> None:
    rewards = [0.0, 0.5, 0.0, -0.25, 1.0]
    expected = [math.fsum(gamma ** (k - t) * rewards[k] for k in range(t, 5)) for t in range(5)]
    assert discounted_returns(np.array(rewards), gamma) == pytest.approx(expected, abs=1e-12)
    assert discounted_returns(np.zeros(0), gamma).tolist() == []


def test_whitening_is_over_all_tokens_with_the_weights_of_their_samples() -> None:
    columns, weights = [[1.0, 1.0, 2.0], [-1.0], [0.5, 4.0]], [1.0, 0.5, 0.5]
    pairs = [(a, w) for column, w in zip(columns, weights, strict=True) for a in column]
    total = math.fsum(w for _, w in pairs)
    mean = math.fsum(w * a for a, w in pairs) / total
    std = math.sqrt(math.fsum(w * (a - mean) ** 2 for a, w in pairs) / total)
    found = whiten([np.array(column) for column in columns], weights)
    for column, ours in zip(columns, found, strict=True):
        assert ours == pytest.approx([(a - mean) / (std + 1e-6) for a in column], abs=1e-12)


def test_whitening_equal_advantages_gives_zeros_and_nothing_gives_nothing() -> None:
    assert [c.tolist() for c in whiten([np.array([0.5, 0.5]), np.array([0.5])], [1.0, 1.0])] == [[0.0, 0.0], [0.0]]
    assert [c.tolist() for c in whiten([np.zeros(0)], [1.0])] == [[]]
