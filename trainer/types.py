"""Data that the main process of a run exchanges with the trainer's ranks.

numpy only: the main process does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from agentloop.config import AlgorithmConfig, TrainerConfig

Aggregation = Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "constant"]


class Sample(Protocol):
    """The fields of a sample that packing and the channel use. Its token arrays have length L.

    Attributes:
        COLUMNS: names of its float32 columns, one number for each token.
        OPTIONAL_COLUMNS: names of those that may be None.
        token_ids: int32.
        loss_mask: bool; True where the token is trained, that is, predicted from the tokens before
            it. Never True for token 0.
        prompt_length: the prompt is `token_ids[:prompt_length]`.
        group_key: samples of one call with an equal key have an identical prompt, which is computed
            once for all.
        weight: factor on this sample's loss, and on its share of the normalizer.
        images: uint8; its image files (PNG, JPEG), in the order of their placeholders in
            `token_ids`.
    """

    COLUMNS: ClassVar[tuple[str, ...]]
    OPTIONAL_COLUMNS: ClassVar[tuple[str, ...]]

    token_ids: np.ndarray
    loss_mask: np.ndarray
    prompt_length: int
    group_key: int
    weight: float
    images: tuple[np.ndarray, ...]

    def __len__(self) -> int: ...

    @property
    def trained_tokens(self) -> int:
        """The number of tokens with loss mask 1."""


@dataclass(slots=True)
class TrainSample:
    """One trajectory, ready to train the policy. `Sample` describes the fields not listed here.

    Attributes:
        old_logprobs: float32 (L); the engine's logprobs, of the distribution it sampled from; 0
            where the mask is 0.
        advantages: float32 (L); 0 where the mask is 0.
        proximal_logprobs: float32 (L); the trainer's own at the start of the step. None: the loss
            uses its current logprobs, which are equal until the first optimizer step.
        trainer_logprobs: float32 (L); what the forward pass of the update computed, 0 where the
            mask is 0; None: not asked for. For traces only: it is not sent to the ranks.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = ("old_logprobs", "advantages")
    OPTIONAL_COLUMNS: ClassVar[tuple[str, ...]] = ("proximal_logprobs",)

    token_ids: np.ndarray
    loss_mask: np.ndarray
    old_logprobs: np.ndarray
    advantages: np.ndarray
    prompt_length: int
    group_key: int
    weight: float = 1.0
    proximal_logprobs: np.ndarray | None = None
    trainer_logprobs: np.ndarray | None = None
    images: tuple[np.ndarray, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def trained_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_mask))

    def check(self) -> None:
        """Refuse a sample whose fields do not fit together.

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
            raise ValueError("a token of the prompt has loss mask 1: prompt tokens must not be trained")


@dataclass(slots=True)
class ValueSample:
    """One trajectory, ready to train the critic. `Sample` describes the fields not listed here.

    Attributes:
        values: float32 (L); the critic's values before this step; 0 where the mask is 0.
        returns: float32 (L); the targets; 0 where the mask is 0.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = ("values", "returns")
    OPTIONAL_COLUMNS: ClassVar[tuple[str, ...]] = ()

    token_ids: np.ndarray
    loss_mask: np.ndarray
    values: np.ndarray
    returns: np.ndarray
    prompt_length: int
    group_key: int
    weight: float = 1.0
    images: tuple[np.ndarray, ...] = ()

    @classmethod
    def of(cls, sample: TrainSample, *, values: np.ndarray, returns: np.ndarray) -> ValueSample:
        """The critic's view of a sample of the policy."""
        return cls(
            token_ids=sample.token_ids,
            loss_mask=sample.loss_mask,
            values=values,
            returns=returns,
            prompt_length=sample.prompt_length,
            group_key=sample.group_key,
            weight=sample.weight,
            images=sample.images,
        )

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def trained_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_mask))


class TokenNumbers(NamedTuple):
    """One number for each trained token of a rank's samples, as parallel columns (N).

    Attributes:
        sample_index, token_index: int64; number n belongs to
            `samples[sample_index[n]].token_ids[token_index[n]]`.
        numbers: float32.
    """

    sample_index: np.ndarray
    token_index: np.ndarray
    numbers: np.ndarray


class Accumulated(NamedTuple):
    """The answer of a rank to `accumulate`.

    Attributes:
        sums: over its trained tokens.
        logprobs: float32; of its trained tokens under the policy, sample after sample; empty if not
            asked for.
    """

    sums: dict[str, float]
    logprobs: np.ndarray


@dataclass(frozen=True, slots=True)
class Published:
    """Result of publishing the policy.

    Attributes:
        checksum: of the tensors (`agentloop.weights.layout.checksum`), from rank 0; empty from the
            others.
        error: why the tensors did not reach the engines; empty if they did, or if the transport
            only writes.
    """

    checksum: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class SaveStatus:
    """State of a rank's part of a checkpoint.

    Attributes:
        done: whether the writing has ended.
        error: why it failed; empty if it did not.
    """

    done: bool
    error: str


@dataclass(frozen=True, slots=True)
class LearnerSettings:
    """Settings that a rank needs to build its learner.

    Attributes:
        adapters: checkpoint whose adapters the policy starts with; None: new ones.
    """

    model_path: str
    config: TrainerConfig
    dtype: str
    total_steps: int
    seed: int
    reference: bool = False
    init: Literal["weights", "random"] = "weights"
    trust_remote_code: bool = False
    adapters: Path | None = None


@dataclass(frozen=True, slots=True)
class LossSpec:
    """The loss of each trained token. The fields are named as in `AlgorithmConfig`.

    Attributes:
        kind: a loss of `learner.losses.policy_loss`; `sft` is cross entropy, which ignores
            advantages.
        aggregation: how the token losses of one sequence are weighted; the run divides the sum
            (`algorithms.aggregation.normalizer`).
        decoupled: the ratio is taken against the proximal policy instead of the engine's logprobs.
        importance, mask, veto: as in `learner.losses.mismatch`.
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

    @property
    def only_advantages(self) -> bool:
        """Whether tokens with the advantage 0 have no gradient."""
        return self.kind != "sft" and not self.kl_coef and not self.entropy_coef

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


def add_sums(total: dict[str, float], part: Mapping[str, float]) -> None:
    """Merge the result of an `accumulate` call, or of one of its ranks, into `total`.

    Sums are added; of `*_max` the larger is kept.
    """
    for key, value in part.items():
        total[key] = max(total.get(key, value), value) if key.endswith("_max") else total.get(key, 0.0) + value
