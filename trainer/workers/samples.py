"""Samples on their way to the ranks: checked, divided, and given the numbers that come back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.types import LossSpec, TokenNumbers, TrainSample


def check_samples(samples: Sequence[TrainSample], temperature: float) -> None:
    """Refuse samples that cannot be trained on.

    Raises:
        ValueError: a sample's columns do not fit together, or the temperature is 0.
    """
    if temperature <= 0:
        raise ValueError("temperature 0 has no logprobs to train on: set rollout.sampling.temperature above 0")
    for index, sample in enumerate(samples):
        try:
            sample.check()
        except ValueError as exc:
            raise ValueError(f"sample {index}: {exc}") from exc


def by_gradient(samples: Sequence[TrainSample], spec: LossSpec) -> tuple[list[TrainSample], list[TrainSample]]:
    """Divide samples into those with a gradient and those of groups without any.

    A group stays whole: its samples share the prompt.
    """
    if not spec.only_advantages:
        return list(samples), []
    moving = {sample.group_key for sample in samples if sample.advantages.any()}
    with_gradient = [sample for sample in samples if sample.group_key in moving]
    return with_gradient, [sample for sample in samples if sample.group_key not in moving]


def by_sample(
    samples: Sequence[TrainSample], shares: Sequence[Sequence[int]], answers: Sequence[TokenNumbers]
) -> list[np.ndarray]:
    """Put the number of each trained token at its place in its sample; 0 elsewhere."""
    result = [np.zeros(len(sample), dtype=np.float32) for sample in samples]
    for share, (sample_index, token_index, numbers) in zip(shares, answers, strict=True):
        for local in np.unique(sample_index):
            rows = sample_index == local
            result[share[local]][token_index[rows]] = numbers[rows]
    return result


def set_logprobs(samples: Sequence[TrainSample], logprobs: np.ndarray) -> None:
    """Set `trainer_logprobs` from those of the trained tokens, sample after sample."""
    begin = 0
    for sample in samples:
        column = np.zeros(len(sample), dtype=np.float32)
        end = begin + sample.trained_tokens
        column[sample.loss_mask] = logprobs[begin:end]
        sample.trainer_logprobs = column
        begin = end
