"""Policy losses: one number per trained token, summed later. Pure functions of torch tensors.

Shapes: N trained tokens of a micro-batch. All logprobs are natural logarithms at the sampling
temperature. `old` is the policy that the ratio is taken against: the one that sampled, or the
proximal policy (`mismatch`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.learner.losses.ratios import Segments, bounded


def ppo_clip(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    low: float,
    high: float,
    dual: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate with separate bounds and an optional dual clip.

    With `r = exp(logprob - old_logprob)`: `loss = -min(r A, clip(r, 1 - low, 1 + high) A)`, and
    where `A < 0` and `dual` is set, `loss = min(loss, -dual A)`.

    Sources: PPO (arXiv 1707.06347), equation 7; separate bounds: DAPO (arXiv 2503.14476), equation
    10; dual clip: arXiv 1912.09729, equation 5.

    Returns:
        loss (N), and whether the clip bound was the active one (N, bool: that token has no
        gradient).
    """
    return _clipped(bounded(logprobs_N - old_logprobs_N).exp(), advantages_N, low, high, dual)


def gspo(
    logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, segments: Segments, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate with one ratio per sample, `s = exp(mean of its tokens' log ratios)`.

    Source: Group Sequence Policy Optimization (arXiv 2507.18071), equations 5 and 7, in the token
    form of equation 13: the value is that of s, the gradient of token t is `s A` times that of its
    logprob. With the aggregation seq_mean_token_mean the sum over a sample is equation 5; tool
    output does not count towards its length.

    Returns:
        as `ppo_clip`.
    """
    sequence_N = segments.mean(logprobs_N.detach() - old_logprobs_N)
    ratio_N = bounded(sequence_N + logprobs_N - logprobs_N.detach()).exp()
    return _clipped(ratio_N, advantages_N, low, high, None)


def cispo(
    logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """`-sg(clip(r, 1 - low, 1 + high)) A logprob`: every token keeps its gradient.

    Source: MiniMax-M1 (arXiv 2506.13585), equations 4 and 5. The paper sets no lower bound: `low =
        1`.

    Returns:
        loss (N), and whether the weight was clipped (N, bool).
    """
    ratio_N = bounded(logprobs_N.detach() - old_logprobs_N).exp()
    weight_N = ratio_N.clamp(1.0 - low, 1.0 + high)
    return -weight_N * advantages_N * logprobs_N, weight_N != ratio_N


def policy_gradient(logprobs_N: Tensor, advantages_N: Tensor) -> Tensor:
    """`-A logprob`: REINFORCE with a baseline (Williams 1992), for on-policy samples only."""
    return -advantages_N * logprobs_N


def _clipped(
    ratio_N: Tensor, advantages_N: Tensor, low: float, high: float, dual: float | None
) -> tuple[Tensor, Tensor]:
    unclipped_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * ratio_N.clamp(1.0 - low, 1.0 + high)
    loss_N = torch.maximum(unclipped_N, clipped_N)
    active_N = clipped_N > unclipped_N

    if dual is not None:
        bound_N = -dual * advantages_N
        dual_N = (advantages_N < 0) & (bound_N < loss_N)
        loss_N = torch.where(dual_N, bound_N, loss_N)
        active_N = active_N | dual_N

    return loss_N, active_N
