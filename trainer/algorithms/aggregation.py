"""How the losses of tokens become one number: a weight for each token, and what the sum is divided by.

The two are apart because samples stream in: a rank sums weighted losses, and the optimizer step divides the sum by what
all samples of its minibatch count together. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.types import Aggregation, Sample


def token_weight(sample_weight: float, trained_tokens: int, aggregation: Aggregation) -> float:
    """The factor of each token's loss; 1 / (trained tokens of its sample) for `seq_mean_token_mean`, else 1, times the
    sample's weight."""
    return sample_weight / (trained_tokens if aggregation == "seq_mean_token_mean" else 1)


def normalizer(samples: Sequence[Sample], aggregation: Aggregation, constant: float = 1.0) -> float:
    """The number that `WorkerGroup.step` divides the summed gradient by: what the samples weigh together.

    - `token_mean`: trained tokens; every token of a batch weighs the same. DAPO (arXiv 2503.14476), equation 12.
    - `seq_mean_token_sum`: sequences with a trained token.
    - `seq_mean_token_mean`: the same, each loss divided by its sequence's length before. DeepSeekMath (arXiv
      2402.03300), equation 3.
    - `constant`: sequences times a constant, most often the longest answer allowed: no bias towards short right and
      long wrong answers, and gradients of the size that a mean over tokens has. Dr. GRPO (arXiv 2503.20783), section 3.

    Each sample counts with its weight, as its loss does: k samples of weight 1/k with the same tokens are one sample. 1
    when nothing was trained, so that a zero gradient is divided by one.
    """
    if aggregation == "token_mean":
        count = sum(sample.weight * sample.trained_tokens for sample in samples)
    else:
        count = sum(sample.weight for sample in samples if sample.loss_mask.any())
        count *= constant if aggregation == "constant" else 1.0
    return float(count) or 1.0
