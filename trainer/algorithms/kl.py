"""Estimators of KL(policy || other) at tokens sampled from the policy, and the coefficient of a KL term.

The estimators take numpy arrays or torch tensors: in the reward they are computed in the main process, in the loss in
the ranks. Source of k1, k2 and k3: J. Schulman, "Approximating KL divergence" (2020).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from trainer.algorithms import MAX_LOG_RATIO

KlKind = Literal["k1", "k2", "k3", "low_var_kl"]

LOW_VAR_BOUND = 10.0
"""What `low_var_kl` is at most: beyond it the term has no gradient."""


def k1(logprobs: Any, other_logprobs: Any) -> Any:
    """`logprob - other`: unbiased, of high variance, may be negative. In a loss its expected gradient is 0."""
    return logprobs - other_logprobs


def k2(logprobs: Any, other_logprobs: Any) -> Any:
    """`(logprob - other)^2 / 2`: biased; in a loss its expected gradient is that of the KL, on policy."""
    return 0.5 * (logprobs - other_logprobs) ** 2


def k3(logprobs: Any, other_logprobs: Any) -> Any:
    """`exp(d) - d - 1`, `d = other - logprob`: unbiased, of low variance, never negative."""
    log_ratio = (other_logprobs - logprobs).clip(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return _exp(log_ratio) - log_ratio - 1.0


def low_var_kl(logprobs: Any, other_logprobs: Any) -> Any:
    """`min(k3, 10)`: a token that the reference finds absurd cannot outweigh all others."""
    return k3(logprobs, other_logprobs).clip(-LOW_VAR_BOUND, LOW_VAR_BOUND)


_KINDS = {"k1": k1, "k2": k2, "k3": k3, "low_var_kl": low_var_kl}


def estimate(kind: KlKind, logprobs: Any, other_logprobs: Any) -> Any:
    """The estimator `kind` of each token."""
    return _KINDS[kind](logprobs, other_logprobs)


class KlCoefficient:
    """The coefficient of a KL term: fixed, or led towards a target.

    After each step with a mean KL of `kl` nats a token, `error = clip(kl / target - 1, -0.2, 0.2)` and
    `coefficient *= 1 + gain * error`. Source: Ziegler et al., Fine-Tuning Language Models from Human Preferences (arXiv
    1909.08593), section 2.2, with `gain` 0.1; there the KL is that of a whole answer.

    Args:
        target: None keeps the coefficient as it is.
    """

    def __init__(self, coefficient: float, target: float | None = None, gain: float = 0.1) -> None:
        self.value = coefficient
        self._target = target
        self._gain = gain

    def resume(self, value: float | None) -> None:
        """Go on from where a stopped run had led the coefficient; a fixed one is what the recipe says now."""
        if self._target is not None and value is not None:
            self.value = value

    def update(self, kl: float | None) -> None:
        """Take a step's mean KL into account; None: nothing was measured."""
        if self._target is not None and kl is not None:
            self.value *= 1.0 + self._gain * float(np.clip(kl / self._target - 1.0, -0.2, 0.2))


def _exp(values: Any) -> Any:
    return np.exp(values) if isinstance(values, np.ndarray) else values.exp()
