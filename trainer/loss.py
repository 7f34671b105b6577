"""Policy losses: one number per trained token, summed later. Small pure functions of torch tensors.

Shapes: N trained tokens of a micro-batch. All logprobs are natural logarithms at the sampling temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.types import LossSpec

MAX_LOG_RATIO = 20.0
"""Bound on |log ratio| before `exp`, so that one absurd token cannot turn the batch into inf."""


def ppo_clip(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    low: float,
    high: float,
    dual: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate with separate bounds and an optional dual clip.

    With `r = exp(logprob - old_logprob)`: `loss = -min(r A, clip(r, 1 - low, 1 + high) A)`, and where `A < 0` and
    `dual` is set, `loss = min(loss, -dual A)`.

    Sources: PPO (arXiv 1707.06347), equation 7; separate bounds: DAPO (arXiv 2503.14476), equation 10; dual clip:
    arXiv 1912.09729, equation 5.

    Returns:
        loss (N), and whether the clip bound was the active one (N, bool: that token has no gradient).
    """
    ratio_N = (logprobs_N - old_logprobs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
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


def policy_gradient(logprobs_N: Tensor, advantages_N: Tensor) -> Tensor:
    """`-A logprob`: REINFORCE with a baseline (Williams 1992). Right only for samples of the current policy."""
    return -advantages_N * logprobs_N


def k3(logprobs_N: Tensor, other_logprobs_N: Tensor) -> Tensor:
    """`exp(d) - d - 1`, `d = other - logprob`: KL(policy || other) at a token sampled from the policy; never negative.

    Source: J. Schulman, "Approximating KL divergence" (2020), estimator k3.
    """
    log_ratio_N = (other_logprobs_N - logprobs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio_N.exp() - log_ratio_N - 1.0


def token_losses(
    spec: LossSpec,
    logprobs_N: Tensor,
    entropy_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    reference_N: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each token as `spec` says, with its KL and entropy terms, and per-token values for the metrics.

    Returns:
        loss (N), and `{clip, kl_ref}` (N each, no gradient; `kl_ref` is 0 without a reference).
    """
    active_N = torch.zeros_like(logprobs_N, dtype=torch.bool)
    if spec.kind == "sft":
        loss_N = -logprobs_N
    elif spec.kind == "pg":
        loss_N = policy_gradient(logprobs_N, advantages_N)
    else:
        loss_N, active_N = ppo_clip(
            logprobs_N, old_logprobs_N, advantages_N, spec.clip_ratio_low, spec.clip_ratio_high, spec.clip_ratio_c
        )
    kl_N = torch.zeros_like(logprobs_N)
    if reference_N is not None:
        kl_N = k3(logprobs_N, reference_N)
        loss_N = loss_N + spec.kl_coef * kl_N
    if spec.entropy_coef:
        loss_N = loss_N - spec.entropy_coef * entropy_N
    return loss_N, {"clip": active_N, "kl_ref": kl_N.detach()}
