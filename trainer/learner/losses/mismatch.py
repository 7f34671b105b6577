"""Corrections for an engine whose probabilities differ from the trainer's, or with older weights.

The engine uses different kernels and, with `max_staleness` > 0, an older policy version. The policy
that sampled, mu, then differs from the proximal policy pi, around which the trust region is taken:
the trainer's own logprobs at the start of the step. All functions work on `d = log pi - log mu` of
the sampled tokens, without a gradient.

A masked token has loss 0 and still counts in the denominators: dividing by the number of kept
tokens would scale up the rest whenever some are masked. Shapes: N trained tokens of a micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.learner.losses.ratios import Segments, bounded
from trainer.types import LossSpec


def token_weights(log_ratio_N: Tensor, cap: float | None) -> Tensor:
    """`min(exp(d), cap)`: importance weights of tokens, truncated.

    Without a cap, and with the loss's ratio taken against pi, this is decoupled PPO (arXiv
    2110.00641, equation 7). With a cap: truncated importance sampling (Ionides 2008; between engine
    and trainer: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training", 2025).
    """
    weights_N = bounded(log_ratio_N).exp()
    return weights_N if cap is None else weights_N.clamp(max=cap)


def sequence_weights(log_ratio_N: Tensor, segments: Segments, cap: float | None) -> Tensor:
    """`min(exp(sum of d over the sample), cap)`, the same for all tokens of a sample.

    Unbiased where the cap is inactive.

    Source: the importance weight of a whole trajectory (Precup et al. 2000), truncated as in
        `token_weights`.
    """
    return token_weights(segments.sum(log_ratio_N), cap)


def token_mask(log_ratio_N: Tensor, low: float, high: float) -> Tensor:
    """Whether `low <= exp(d) <= high` (N, bool). With `token_weights` uncapped this is IcePop.

    Source: Ring-1T (arXiv 2510.18855), IcePop: tokens outside the bounds are discarded, not
        clipped.
    """
    ratio_N = bounded(log_ratio_N).exp()
    return (ratio_N >= low) & (ratio_N <= high)


def geometric_mask(log_ratio_N: Tensor, segments: Segments, low: float, high: float) -> Tensor:
    """Whether `low <= exp(mean of d over the sample) <= high` (N, bool), by whole samples.

    Unlike their product, the geometric mean of the token ratios does not depend on the length.
    Source: Liu et al., "When Speed Kills Stability: Demystifying RL Collapse from the
    Training-Inference Mismatch" (2025).
    """
    return token_mask(segments.mean(log_ratio_N), low, high)


def veto_mask(log_ratio_N: Tensor, segments: Segments, least: float) -> Tensor:
    """False for all tokens of a sample in which some token has `exp(d) < least` (N, bool).

    The trainer gives such a token almost no probability: the engine sampled it from a broken
    distribution, and the tokens after it carry no information. Source: as `geometric_mask`.
    """
    return ~segments.any(bounded(log_ratio_N).exp() < least)


def correction(spec: LossSpec, log_ratio_N: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Return the factor of each token's policy loss, and whether it is kept (N each), by `spec`."""
    kept_N = torch.ones_like(log_ratio_N, dtype=torch.bool)
    if spec.mask == "token":
        kept_N = token_mask(log_ratio_N, spec.mask_low, spec.mask_high)
    elif spec.mask == "geometric":
        kept_N = geometric_mask(log_ratio_N, segments, spec.mask_low, spec.mask_high)
    if spec.veto is not None:
        kept_N = kept_N & veto_mask(log_ratio_N, segments, spec.veto)

    factor_N = torch.ones_like(log_ratio_N)
    if spec.importance == "token":
        factor_N = token_weights(log_ratio_N, spec.importance_cap)
    elif spec.importance == "sequence":
        factor_N = sequence_weights(log_ratio_N, segments, spec.importance_cap)

    return factor_N * kept_N, kept_N
