"""Group-relative advantages: rewards of one group in; one number per episode out, or one per step. No torch.

Shapes: G episodes of a group, K_i steps of episode i. Failed and rejected episodes are taken out of the group before:
they have no reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

AdvantageKind = Literal["grpo", "dr_grpo", "rloo"]
"""Estimators of the outcome. `grpo_process` is the one of steps."""

STD_EPSILON = 1e-6
"""Added to the standard deviation, so that a group of equal rewards has advantage 0 and not NaN."""


def grpo(rewards_G: np.ndarray) -> np.ndarray:
    """`(r - mean(r)) / (std(r) + eps)`, std with n - 1; a group of one has advantage 0.

    Source: DeepSeekMath (arXiv 2402.03300), section 4.1.2. The sample standard deviation is what the common
    implementations use; the paper does not say.
    """
    if len(rewards_G) < 2:
        return np.zeros_like(rewards_G)
    return (rewards_G - rewards_G.mean()) / (rewards_G.std(ddof=1) + STD_EPSILON)


def dr_grpo(rewards_G: np.ndarray) -> np.ndarray:
    """`r - mean(r)`: without the division, which weighs very easy and very hard prompts up.

    Source: Understanding R1-Zero-Like Training (arXiv 2503.20783), section 3.2.
    """
    if len(rewards_G) < 2:
        return np.zeros_like(rewards_G)
    return rewards_G - rewards_G.mean()


def rloo(rewards_G: np.ndarray) -> np.ndarray:
    """`r_i - mean of the other rewards`, which is `(r_i - mean(r)) * G / (G - 1)`; a group of one has advantage 0.

    Source: Back to Basics (arXiv 2402.14740), equation 8.
    """
    if len(rewards_G) < 2:
        return np.zeros_like(rewards_G)
    return (rewards_G - rewards_G.mean()) * (len(rewards_G) / (len(rewards_G) - 1))


def grpo_process(rewards: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """Step k of episode i has the advantage `sum over j >= k of (r_ij - mean(R)) / (std(R) + eps)`.

    R holds all step rewards of the group together; std with n - 1, as in `grpo`; a group with one step reward in all
    has advantage 0. Source: DeepSeekMath (arXiv 2402.03300), section 4.1.3, where a token has the advantage of the
    first step that ends at or after it.

    Args:
        rewards: for each episode the rewards of its steps, in the order of their ends; finite.

    Returns:
        for each episode (K_i), float64.

    Raises:
        ValueError: a reward is not finite.
    """
    flat = np.array([reward for steps in rewards for reward in steps], dtype=np.float64)
    if not np.isfinite(flat).all():
        raise ValueError(f"a step reward is not finite: {flat.tolist()}")
    ends = np.cumsum([len(steps) for steps in rewards])[:-1]
    return [np.cumsum(steps[::-1])[::-1] for steps in np.split(grpo(flat), ends)]


_KINDS = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}


def advantages(rewards: np.ndarray, kind: AdvantageKind) -> np.ndarray:
    """The advantages of one group, float64.

    Args:
        rewards: (G), finite.
        kind: the estimator.

    Raises:
        ValueError: an unknown kind, or a reward that is not finite.
    """
    if kind not in _KINDS:
        raise ValueError(f"unknown advantage {kind!r}; known: {', '.join(sorted(_KINDS))}")
    rewards_G = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(rewards_G).all():
        raise ValueError(f"a reward is not finite: {rewards_G.tolist()}")
    return _KINDS[kind](rewards_G)
