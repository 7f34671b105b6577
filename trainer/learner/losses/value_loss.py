"""The critic's loss. Shapes: N trained tokens of a micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_value_loss(
    values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, cliprange: float | None
) -> tuple[Tensor, Tensor]:
    """`max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2`; without a range only the first.

    Source: the value clipping of PPO's first implementation, as in Engstrom et al., Implementation
    Matters in Deep Policy Gradients (arXiv 2005.12729), section 3, point 1.

    Returns:
        loss (N), and whether the bound was active (N, bool: that token has no gradient).
    """
    loss_N = (values_N - returns_N) ** 2
    if cliprange is None:
        return 0.5 * loss_N, torch.zeros_like(loss_N, dtype=torch.bool)
    near_N = old_values_N + (values_N - old_values_N).clamp(-cliprange, cliprange)
    bounded_N = (near_N - returns_N) ** 2
    return 0.5 * torch.maximum(loss_N, bounded_N), bounded_N > loss_N
