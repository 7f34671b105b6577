"""Estimators of KL(policy || other) at tokens sampled from the policy; the KL coefficient.

The estimators accept numpy arrays and torch tensors: a penalty in the reward is computed in the
main process, a term of the loss in the ranks. Source of k1, k2 and k3: J. Schulman, "Approximating
KL divergence" (2020).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from trainer.algorithms import MAX_LOG_RATIO

KlKind = Literal["k1", "k2", "k3", "low_var_kl"]

LOW_VAR_BOUND = 10.0
"""Upper bound of `low_var_kl`; beyond it the term has no gradient."""


def k1(logprobs: Any, other_logprobs: Any) -> Any:
    """`logprob - other`: unbiased, high variance, may be negative. Its gradient in a loss has mean
    0."""
    return logprobs - other_logprobs


def k2(logprobs: Any, other_logprobs: Any) -> Any:
    """`(logprob - other)^2 / 2`: biased. On policy, its gradient in a loss has the mean of the
    KL's."""
    return 0.5 * (logprobs - other_logprobs) ** 2


def k3(logprobs: Any, other_logprobs: Any) -> Any:
    """`exp(d) - d - 1`, `d = other - logprob`: unbiased, of low variance, never negative."""
    log_ratio = (other_logprobs - logprobs).clip(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return _exp(log_ratio) - log_ratio - 1.0


def low_var_kl(logprobs: Any, other_logprobs: Any) -> Any:
    """`min(k3, 10)`: a token that the reference finds very unlikely cannot outweigh the others."""
    return k3(logprobs, other_logprobs).clip(-LOW_VAR_BOUND, LOW_VAR_BOUND)


_KINDS: dict[KlKind, Callable[[Any, Any], Any]] = {"k1": k1, "k2": k2, "k3": k3, "low_var_kl": low_var_kl}


def estimate(kind: KlKind, logprobs: Any, other_logprobs: Any) -> Any:
    """Return the estimate of each token."""
    return _KINDS[kind](logprobs, other_logprobs)


class KlCoefficient:
    """The coefficient of a KL term: fixed, or controlled towards a target.

    After each step with a mean KL of `kl` nats a token, `error = clip(kl / target - 1, -0.2, 0.2)`
    and `coefficient *= 1 + gain * error`. Source: Ziegler et al., Fine-Tuning Language Models from
    Human Preferences (arXiv 1909.08593), section 2.2, with `gain` 0.1; the paper uses the KL of a
    whole answer.

    Args:
        target: None: the coefficient is fixed.
    """

    def __init__(self, coefficient: float, target: float | None = None, gain: float = 0.1) -> None:
        self.value = coefficient
        self._target = target
        self._gain = gain

    def resume(self, value: float | None) -> None:
        """Restore the value of a stopped run; a fixed coefficient stays that of the recipe."""
        if self._target is not None and value is not None:
            self.value = value

    def update(self, kl: float | None) -> None:
        """Adapt to the mean KL of a step; None: it was not measured."""
        if self._target is not None and kl is not None:
            self.value *= 1.0 + self._gain * float(np.clip(kl / self._target - 1.0, -0.2, 0.2))


def _exp(values: Any) -> Any:
    return np.exp(values) if isinstance(values, np.ndarray) else values.exp()
