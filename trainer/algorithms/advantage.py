"""Advantages of the episodes of a group, of their steps, or of an episode's tokens; and whitening.

Shapes: G episodes of a group, K_i steps of episode i, T sampled tokens of one episode in the order
in which they were sampled. Failed and rejected episodes, which have no reward, are removed from the
group before. Tokens that were not sampled (prompts, tool output) do not appear in these arrays, so
they neither cut nor discount a return.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

STD_EPSILON = 1e-6
"""Added to the standard deviation, so that equal rewards give advantage 0 instead of NaN."""


def grpo(rewards_G: np.ndarray) -> np.ndarray:
    """`(r - mean(r)) / (std(r) + eps)`, std with n - 1; a group of one has advantage 0.

    Source: DeepSeekMath (arXiv 2402.03300), section 4.1.2. The common implementations use the
    sample standard deviation; the paper does not specify it.
    """
    if len(rewards_G) < 2:
        return np.zeros_like(rewards_G)
    advantages_G: np.ndarray = (rewards_G - rewards_G.mean()) / (rewards_G.std(ddof=1) + STD_EPSILON)
    return advantages_G


def dr_grpo(rewards_G: np.ndarray) -> np.ndarray:
    """`r - mean(r)`: without the division, which gives very easy and very hard prompts more weight.

    Source: Understanding R1-Zero-Like Training (arXiv 2503.20783), section 3.2.
    """
    if len(rewards_G) < 2:
        return np.zeros_like(rewards_G)
    advantages_G: np.ndarray = rewards_G - rewards_G.mean()
    return advantages_G


def rloo(rewards_G: np.ndarray) -> np.ndarray:
    """`r_i - mean of the other rewards`, or `(r_i - mean(r)) * G / (G - 1)`; 0 for a group of one.

    Source: Back to Basics (arXiv 2402.14740), equation 8.
    """
    if len(rewards_G) < 2:
        return np.zeros_like(rewards_G)
    advantages_G: np.ndarray = (rewards_G - rewards_G.mean()) * (len(rewards_G) / (len(rewards_G) - 1))
    return advantages_G


def grpo_process(rewards: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """Step k of episode i has the advantage `sum over j >= k of (r_ij - mean(R)) / (std(R) + eps)`.

    R holds all step rewards of the group together; std with n - 1, as in `grpo`; a group with a
    single step reward has advantage 0. Source: DeepSeekMath (arXiv 2402.03300), section 4.1.3,
    where a token has the advantage of the first step that ends at or after it.

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


def remax(rewards_G: np.ndarray, baseline: float) -> np.ndarray:
    """`r - r_greedy`: the baseline is the reward of a greedily decoded episode of the prompt.

    Source: ReMax (arXiv 2310.10505), algorithm 1. The greedy episode itself is not trained.
    """
    return rewards_G - baseline


def gae(rewards_T: np.ndarray, values_T: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Generalized advantage estimation: `A_t = d_t + gamma lam A_t+1`.

    Here `d_t = r_t + gamma V_t+1 - V_t`, and V after the end is 0.

    Source: High-Dimensional Continuous Control Using Generalized Advantage Estimation
    (arXiv 1506.02438), equation 16.

    Args:
        rewards_T: reward of each token.
        values_T: the critic's value of the state in which each token was sampled.

    Returns:
        (T) float64. The critic's targets are this plus `values_T`.
    """
    advantages_T = np.zeros(len(rewards_T), dtype=np.float64)
    ahead, value_ahead = 0.0, 0.0
    for t in range(len(rewards_T) - 1, -1, -1):
        delta = rewards_T[t] + gamma * value_ahead - values_T[t]
        ahead = delta + gamma * lam * ahead
        value_ahead = values_T[t]
        advantages_T[t] = ahead
    return advantages_T


def discounted_returns(rewards_T: np.ndarray, gamma: float) -> np.ndarray:
    """`G_t = sum over k >= 0 of gamma^k r_t+k`, which REINFORCE++ whitens.

    Source: REINFORCE++ (arXiv 2501.03262), section 3.1, where the rewards are the outcome at the
    last token and the KL penalty at each; step rewards are at the last token of their turn.
    """
    return gae(rewards_T, np.zeros(len(rewards_T)), gamma, 1.0)


def whiten(columns: Sequence[np.ndarray], weights: Sequence[float]) -> list[np.ndarray]:
    """`(A - mean) / (std + eps)` over all tokens of a batch, which must be complete.

    Mean and (population) standard deviation weight each token by its sample's weight, as the loss
    does. Source: REINFORCE++ (arXiv 2501.03262), section 3.1, global advantage normalization.

    Args:
        columns: for each sample the advantages of its trained tokens.
        weights: of each sample.

    Returns:
        the same columns, whitened, float64; zeros where all advantages are equal.
    """
    total = sum(weight * len(column) for column, weight in zip(columns, weights, strict=True))
    if not total:
        return [np.asarray(column, dtype=np.float64) for column in columns]

    wide = [np.asarray(column, dtype=np.float64) for column in columns]

    mean = sum(weight * column.sum() for column, weight in zip(wide, weights, strict=True)) / total
    variance = sum(weight * ((column - mean) ** 2).sum() for column, weight in zip(wide, weights, strict=True)) / total
    return [(column - mean) / (np.sqrt(variance) + STD_EPSILON) for column in wide]


_KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp_baseline": dr_grpo,
}
"""REINFORCE++ with a baseline (arXiv 2501.03262, section 3.2): `r - mean(r)` of the group, whitened
over the batch."""


def advantages(rewards: np.ndarray, kind: str) -> np.ndarray:
    """Return the advantages of one group, float64.

    Args:
        rewards: (G), finite.
        kind: an estimator that needs only the rewards of one group.

    Raises:
        ValueError: an unknown kind, or a reward that is not finite.
    """
    if kind not in _KINDS:
        raise ValueError(f"unknown advantage {kind!r}; use one of {', '.join(sorted(_KINDS))}")
    rewards_G = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(rewards_G).all():
        raise ValueError(f"a reward is not finite: {rewards_G.tolist()}")
    return _KINDS[kind](rewards_G)
