"""What the run hands to the trainer's ranks. Plain numpy: the run's main process imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from agentloop.config import AlgorithmConfig

Aggregation = Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean"]


@dataclass(slots=True)
class TrainSample:
    """One trajectory, ready to train. The four arrays have one length L.

    Attributes:
        token_ids: int64.
        loss_mask: bool; token i is trained, that is, predicted from the tokens before it. Token 0 never is.
        old_logprobs: float32; the engine's, of the distribution it sampled from; 0 where the mask is 0.
        advantages: float32; 0 where the mask is 0.
        prompt_length: the prompt is `token_ids[:prompt_length]`.
        group_key: samples of one call with an equal key have an identical prompt, which is computed once for all.
        weight: factor on this sample's loss, and on what it counts in the normalizer.
        images: uint8; the files (PNG, JPEG) of its images, in the order of their places in `token_ids`.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    old_logprobs: np.ndarray
    advantages: np.ndarray
    prompt_length: int
    group_key: int
    weight: float = 1.0
    images: tuple[np.ndarray, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def trained_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_mask))

    def check(self) -> None:
        """Refuse a sample that could only train something wrong.

        Raises:
            ValueError: naming the field.
        """
        n = len(self.token_ids)
        for name in ("loss_mask", "old_logprobs", "advantages"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {n} token ids")
        if not 1 <= self.prompt_length <= n:
            raise ValueError(f"prompt_length {self.prompt_length} is outside 1..{n}")
        if self.loss_mask[: self.prompt_length].any():
            raise ValueError("a token of the prompt has loss mask 1: nothing in the prompt is trained")


@dataclass(frozen=True, slots=True)
class LossSpec:
    """The loss that a rank computes for each trained token.

    Attributes:
        kind: `ppo_clip` and `pg` as in `trainer.loss`; `sft` is cross entropy (advantages are not read).
        aggregation: how token losses of one sequence are weighed; the run divides the sum (`normalizer`).
    """

    kind: Literal["ppo_clip", "pg", "sft"] = "ppo_clip"
    aggregation: Aggregation = "token_mean"
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0

    @classmethod
    def from_config(cls, config: AlgorithmConfig) -> LossSpec:
        return cls(
            kind=config.loss,
            aggregation=config.aggregation,
            clip_ratio_low=config.clip_ratio_low,
            clip_ratio_high=config.clip_ratio_high,
            clip_ratio_c=config.clip_ratio_c,
            kl_coef=config.kl_coef,
            entropy_coef=config.entropy_coef,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def normalizer(samples: Sequence[TrainSample], aggregation: Aggregation) -> float:
    """The number that `WorkerGroup.step` divides the summed gradient by: what the samples weigh together.

    `token_mean`: trained tokens. Both `seq_mean_*`: sequences with a trained token. Each counts with its sample's
    weight, as its loss does: k samples of weight 1/k with the same tokens are one sample. 1 when nothing was trained,
    so that a zero gradient is divided by one.
    """
    if aggregation == "token_mean":
        count = sum(sample.weight * sample.trained_tokens for sample in samples)
    else:
        count = sum(sample.weight for sample in samples if sample.loss_mask.any())
    return float(count) or 1.0
