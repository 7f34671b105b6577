"""The loss of each trained token: a recipe's policy loss, correction, KL and entropy terms.

Shapes: N trained tokens of a micro-batch. All logprobs are natural logarithms at the sampling
temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.algorithms.kl import estimate, k3
from trainer.learner.losses.mismatch import correction
from trainer.learner.losses.policy_loss import cispo, gspo, policy_gradient, ppo_clip
from trainer.learner.losses.ratios import Segments, bounded
from trainer.types import LossSpec


def token_losses(
    spec: LossSpec,
    logprobs_N: Tensor,
    entropy_N: Tensor,
    engine_N: Tensor,
    advantages_N: Tensor,
    reference_N: Tensor | None,
    segments: Segments,
    proximal_N: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of each token under `spec`, and per-token values for the metrics.

    The correction applies to the policy loss alone: a token that it masks still has its KL term.

    Args:
        engine_N: the logprobs that the tokens were sampled with.
        proximal_N: the trainer's logprobs at the start of the step; None: the current ones, which
            are the same until the first optimizer step.

    Returns:
        loss (N), and (N each, no gradient) `clip`; `kl_ref`, 0 without a reference; `masked`; and
        between trainer and engine `logprob_abs`, `k3` and `weight`, the ratio of their
        probabilities.
    """
    if proximal_N is None:
        proximal_N = logprobs_N.detach()
    log_ratio_N = proximal_N - engine_N

    loss_N, active_N = _policy_loss(
        spec, logprobs_N, proximal_N if spec.decoupled else engine_N, advantages_N, segments
    )
    kept_N = torch.ones_like(active_N)
    if spec.importance != "none" or spec.mask != "none" or spec.veto is not None:
        factor_N, kept_N = correction(spec, log_ratio_N, segments)
        loss_N = factor_N * loss_N

    # After the correction, which must not scale these terms.
    kl_N = torch.zeros_like(logprobs_N)
    if reference_N is not None:
        kl_N = estimate(spec.kl_estimator, logprobs_N, reference_N)
        loss_N = loss_N + spec.kl_coef * kl_N
    if spec.entropy_coef:
        loss_N = loss_N - spec.entropy_coef * entropy_N

    return loss_N, {
        "clip": active_N,
        "kl_ref": kl_N.detach(),
        "masked": ~kept_N,
        "logprob_abs": log_ratio_N.abs(),
        "k3": k3(engine_N, proximal_N),
        "weight": bounded(log_ratio_N).exp(),
    }


def _policy_loss(
    spec: LossSpec, logprobs_N: Tensor, old_N: Tensor, advantages_N: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    low, high = spec.clip_ratio_low, spec.clip_ratio_high
    match spec.kind:
        case "ppo_clip":
            return ppo_clip(logprobs_N, old_N, advantages_N, low, high, spec.clip_ratio_c)
        case "gspo":
            return gspo(logprobs_N, old_N, advantages_N, segments, low, high)
        case "cispo":
            return cispo(logprobs_N, old_N, advantages_N, low, high)

    never_N = torch.zeros_like(logprobs_N, dtype=torch.bool)
    return (-logprobs_N if spec.kind == "sft" else policy_gradient(logprobs_N, advantages_N)), never_N
