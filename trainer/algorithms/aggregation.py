"""Aggregation of token losses into one number: a weight for each token, and a divisor for the sum.

They are separate because samples stream in: ranks sum weighted losses, and the optimizer step
divides the sum by a count over all samples of its minibatch.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.types import Aggregation, Sample


def token_weight(sample_weight: float, trained_tokens: int, aggregation: Aggregation) -> float:
    """Return the factor on each token's loss.

    The sample's weight, divided by its number of trained tokens for `seq_mean_token_mean`.
    """
    return sample_weight / (trained_tokens if aggregation == "seq_mean_token_mean" else 1)


def normalizer(samples: Sequence[Sample], aggregation: Aggregation, constant: float = 1.0) -> float:
    """Return the number that `WorkerGroup.step` divides the summed gradient by.

    - `token_mean`: trained tokens; every token of a batch has the same weight. DAPO (arXiv
      2503.14476), equation 12.
    - `seq_mean_token_sum`: sequences with a trained token.
    - `seq_mean_token_mean`: the same; each loss has been divided by its sequence's length.
      DeepSeekMath (arXiv 2402.03300), equation 3.
    - `constant`: sequences times a constant, usually the maximum answer length. It avoids a bias
      towards short right and long wrong answers, and keeps gradients as large as a mean over
      tokens. Dr. GRPO (arXiv 2503.20783), section 3.

    Each sample counts with its weight, as its loss does: k samples of weight 1/k with the same
    tokens count as one. The result is 1 if nothing is trained, so that a zero gradient stays zero.
    """
    if aggregation == "token_mean":
        count = sum(sample.weight * sample.trained_tokens for sample in samples)
    else:
        count = sum(sample.weight for sample in samples if sample.loss_mask.any())
        count *= constant if aggregation == "constant" else 1.0
    return float(count) or 1.0
