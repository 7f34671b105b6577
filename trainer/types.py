"""What the run hands to the trainer's ranks. Plain numpy: the run's main process imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from agentloop.config import AlgorithmConfig, TrainerConfig

Aggregation = Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "constant"]


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
        proximal_logprobs: float32; the trainer's own at the start of the step; None: the loss takes those that it
            computes anyway, which are the same ones up to the first optimizer step.
        images: uint8; the files (PNG, JPEG) of its images, in the order of their places in `token_ids`.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    old_logprobs: np.ndarray
    advantages: np.ndarray
    prompt_length: int
    group_key: int
    weight: float = 1.0
    proximal_logprobs: np.ndarray | None = None
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
        if self.proximal_logprobs is not None and len(self.proximal_logprobs) != n:
            raise ValueError(f"proximal_logprobs has {len(self.proximal_logprobs)} entries for {n} token ids")
        if not 1 <= self.prompt_length <= n:
            raise ValueError(f"prompt_length {self.prompt_length} is outside 1..{n}")
        if self.loss_mask[: self.prompt_length].any():
            raise ValueError("a token of the prompt has loss mask 1: nothing in the prompt is trained")


@dataclass(frozen=True, slots=True)
class LearnerSettings:
    """What a rank needs to know at its start."""

    model_path: str
    config: TrainerConfig
    dtype: str
    total_steps: int
    seed: int
    reference: bool = False
    init: Literal["weights", "random"] = "weights"


@dataclass(frozen=True, slots=True)
class LossSpec:
    """The loss that a rank computes for each trained token; the fields are those of `AlgorithmConfig`.

    Attributes:
        kind: a loss of `algorithms.policy_loss`; `sft` is cross entropy (advantages are not read).
        aggregation: how token losses of one sequence are weighed; the run divides the sum (`aggregation.normalizer`).
        decoupled: the loss's ratio is taken against the proximal policy, not against the engine's logprobs.
        importance, mask, veto: as in `algorithms.mismatch`.
    """

    kind: Literal["ppo_clip", "gspo", "cispo", "pg", "sft"] = "ppo_clip"
    aggregation: Aggregation = "token_mean"
    aggregation_constant: float = 1.0
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float | None = None
    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3", "low_var_kl"] = "k3"
    entropy_coef: float = 0.0
    decoupled: bool = False
    importance: Literal["none", "token", "sequence"] = "none"
    importance_cap: float | None = None
    mask: Literal["none", "token", "geometric"] = "none"
    mask_low: float = 0.0
    mask_high: float = 0.0
    veto: float | None = None

    @classmethod
    def from_config(cls, config: AlgorithmConfig) -> LossSpec:
        correction = config.correction
        low, high = correction.mask_bounds
        return cls(
            kind=config.loss,
            aggregation=config.aggregation,
            aggregation_constant=config.aggregation_constant or 1.0,
            clip_ratio_low=config.clip_ratio_low,
            clip_ratio_high=config.clip_ratio_high,
            clip_ratio_c=config.clip_ratio_c,
            kl_coef=config.kl_coef if config.kl_in == "loss" else 0.0,
            kl_estimator=config.kl_estimator,
            entropy_coef=config.entropy_coef,
            decoupled=correction.decoupled,
            importance=correction.effective_importance,
            importance_cap=correction.importance_cap,
            mask=correction.mask,
            mask_low=low,
            mask_high=high,
            veto=correction.veto,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def add_sums(total: dict[str, float], part: Mapping[str, float]) -> None:
    """Add what one `accumulate`, or one rank of it, returned to `total`: sums are added, of `*_max` the larger kept."""
    for key, value in part.items():
        total[key] = max(total.get(key, value), value) if key.endswith("_max") else total.get(key, 0.0) + value
