"""Effective sample size of importance-weighted tokens."""

from __future__ import annotations

from collections.abc import Mapping


def effective_sample_size(sums: Mapping[str, float]) -> float | None:
    """`(sum w)^2 / (n sum w^2)` of the tokens' weights `w = exp(d)`; None without tokens.

    It is 1 when the two policies agree, and approaches 0 when few tokens carry all the weight.
    Source: Kong (1992).

    Args:
        sums: `weight_sum`, `weight_square_sum` and `tokens`.
    """
    squares = sums.get("weight_square_sum", 0.0) * sums.get("tokens", 0.0)
    return sums["weight_sum"] ** 2 / squares if squares else None
