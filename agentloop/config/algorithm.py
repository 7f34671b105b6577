"""Keys of a recipe: advantages, losses, corrections, shaping (docs/algorithms.md)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from agentloop.config.section import Section


class CorrectionConfig(Section):
    """What is done about an engine whose probabilities are not the trainer's, or are of older weights."""

    decoupled: bool = Field(
        False,
        description="take the loss's ratio against the proximal policy, the trainer's own logprobs at the start of the "
        "step, instead of the engine's",
    )
    importance: Literal["none", "token", "sequence"] | None = Field(
        None,
        description="factor proximal / engine probability on each token's loss; needs decoupled; null: token with "
        "decoupled, else none",
    )
    importance_cap: float | None = Field(2.0, gt=0, description="the factor at most; null: not truncated")
    mask: Literal["none", "token", "geometric"] = Field(
        "none",
        description="leave out tokens by their proximal / engine probability, or samples by the geometric mean of it",
    )
    mask_low: float | None = Field(None, ge=0, description="keep from here; null: 0.5 for token, 0.99 for geometric")
    mask_high: float | None = Field(None, gt=0, description="keep up to here; null: 5 for token, 1.01 for geometric")
    veto: float | None = Field(
        None, gt=0, lt=1, description="leave out samples with a token below this proximal / engine probability"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> CorrectionConfig:
        if self.importance not in (None, "none") and not self.decoupled:
            raise ValueError(
                f"importance={self.importance} needs decoupled=true: a ratio against the engine's logprobs holds that "
                "factor already"
            )
        low, high = self.mask_bounds
        if self.mask != "none" and low >= high:
            raise ValueError(f"mask_low {low:g} is not below mask_high {high:g}")
        return self

    @property
    def mask_bounds(self) -> tuple[float, float]:
        """`mask_low` and `mask_high`, or what null means for this mask."""
        low, high = (0.5, 5.0) if self.mask == "token" else (0.99, 1.01)
        return (
            low if self.mask_low is None else self.mask_low,
            high if self.mask_high is None else self.mask_high,
        )

    @property
    def effective_importance(self) -> Literal["none", "token", "sequence"]:
        """`importance`, or what null means."""
        return self.importance or ("token" if self.decoupled else "none")

    @property
    def chosen(self) -> bool:
        """Whether anything is done."""
        return self.decoupled or self.mask != "none" or self.veto is not None


class ShapingConfig(Section):
    """What is added to an episode's reward for its length and its turns; all off (docs/algorithms.md)."""

    overlong_buffer: int | None = Field(
        None,
        ge=1,
        description="tokens before max_response_tokens from which on the reward falls, linearly; null: off",
    )
    overlong_penalty: float = Field(1.0, gt=0, description="by how much it has fallen at max_response_tokens")
    wrong_reward: float | None = Field(
        None, lt=0, description="reward of an episode that earned 0 or less, e.g. -1; null: what it earned"
    )
    turn_bonus: float = Field(
        0.0,
        ge=0,
        description="added to wrong_reward for each turn after the first; can teach to call tools without end",
    )
    turn_bonus_cap: float | None = Field(
        -0.6, le=0, description="wrong_reward with its bonus at most; null: 0, which is not safe"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> ShapingConfig:
        if self.turn_bonus and self.wrong_reward is None:
            raise ValueError("turn_bonus is added to wrong_reward: set that too, e.g. wrong_reward=-1")
        if self.turn_bonus and self.turn_bonus_cap is not None and self.turn_bonus_cap < (self.wrong_reward or 0):
            raise ValueError(f"turn_bonus_cap {self.turn_bonus_cap:g} is below wrong_reward {self.wrong_reward:g}")
        return self

    @property
    def chosen(self) -> bool:
        """Whether anything is changed."""
        return self.overlong_buffer is not None or self.wrong_reward is not None


WITH_RETURNS = ("reinforce_pp", "gae")
"""Estimators that give each token a reward, and so know a discount."""

WHITENED = ("reinforce_pp", "reinforce_pp_baseline", "gae")
"""Estimators that are whitened over the batch unless told otherwise."""

WITH_GROUP_BASELINE = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")
"""Estimators by which an episode alone in its group teaches nothing."""


class AlgorithmConfig(Section):
    """The estimator and the loss: docs/algorithms.md has formula, source and use of every value."""

    advantage: Literal[
        "grpo", "dr_grpo", "rloo", "grpo_process", "reinforce_pp", "reinforce_pp_baseline", "remax", "gae"
    ] = Field(
        "grpo",
        description="grpo, dr_grpo, rloo: group baseline of the reward; grpo_process: of each step reward; "
        "reinforce_pp: return, no baseline; reinforce_pp_baseline: group mean; remax: reward of a greedy episode; gae: "
        "a critic",
    )
    gamma: float = Field(1.0, gt=0, le=1, description="reinforce_pp, gae: discount from one sampled token to the next")
    lam: float = Field(1.0, ge=0, le=1, description="gae: 0 trusts the critic, 1 the returns")
    whiten: bool | None = Field(
        None,
        description="whiten the advantages over the batch, which waits for its last group; null: for reinforce_pp, "
        "reinforce_pp_baseline and gae",
    )
    dynamic_sampling: int = Field(
        0, ge=0, description="how often a group with equal rewards is replaced by another prompt's; 0: never"
    )
    shaping: ShapingConfig = Field(default_factory=ShapingConfig)
    loss: Literal["ppo_clip", "gspo", "cispo", "pg"] = Field("ppo_clip", description="policy loss")
    aggregation: Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "constant"] = Field(
        "token_mean", description="how token losses become one number"
    )
    aggregation_constant: float | None = Field(
        None, gt=0, description="aggregation=constant: sum over a sequence divided by this, mean over sequences"
    )
    clip_ratio_low: float = Field(0.2, ge=0, le=1, description="lower bound: ratio >= 1 - this")
    clip_ratio_high: float = Field(0.2, ge=0, description="upper bound: ratio <= 1 + this")
    clip_ratio_c: float | None = Field(None, gt=1, description="ppo_clip: dual clip for negative advantages; null: off")
    minibatches: int = Field(1, ge=1, description="optimizer steps per batch")
    kl_coef: float = Field(0.0, ge=0, description="weight of the KL to the initial policy; 0: no reference")
    kl_in: Literal["loss", "reward"] = Field("loss", description="a term of the loss, or taken from the reward")
    kl_estimator: Literal["k1", "k2", "k3", "low_var_kl"] = Field(
        "k3", description="of each token; low_var_kl: k3, at most 10"
    )
    kl_target: float | None = Field(
        None, gt=0, description="lead kl_coef so that train/kl_ref comes to this, nats a token; null: fixed"
    )
    kl_gain: float = Field(0.1, gt=0, lt=5, description="kl_target: how fast kl_coef follows")
    entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    correction: CorrectionConfig = Field(default_factory=CorrectionConfig)

    @model_validator(mode="after")
    def _fits_together(self) -> AlgorithmConfig:
        if (self.aggregation == "constant") != (self.aggregation_constant is not None):
            raise ValueError(
                "aggregation=constant and aggregation_constant belong together, e.g. the agents' max_response_tokens"
            )
        if not self.kl_coef:
            for key in ("kl_in", "kl_target"):
                if getattr(self, key) not in ("loss", None):
                    raise ValueError(f"{key}={getattr(self, key)} needs a kl_coef above 0")
        if self.kl_in == "reward" and self.advantage == "grpo_process":
            raise ValueError("kl_in=reward does not go with advantage=grpo_process: use kl_in=loss")
        if self.gamma != 1 and self.advantage not in WITH_RETURNS:
            raise ValueError(f"gamma is read by {' and '.join(WITH_RETURNS)}, not by advantage={self.advantage}")
        if self.lam != 1 and self.advantage != "gae":
            raise ValueError(f"lam is read by gae, not by advantage={self.advantage}")
        if self.clip_ratio_c is not None and self.loss != "ppo_clip":
            raise ValueError(f"clip_ratio_c is read by ppo_clip, not by loss={self.loss}")
        return self

    @property
    def whitens(self) -> bool:
        """`whiten`, or what null means."""
        return self.advantage in WHITENED if self.whiten is None else self.whiten

    @property
    def needs_whole_batch(self) -> str | None:
        """Why training cannot begin before a step's last group is there; None: it can."""
        if self.whitens:
            return "advantages are whitened over the batch"
        if self.minibatches > 1 and self.correction.chosen:
            return "the proximal policy is computed for all minibatches before the first optimizer step"
        if self.minibatches > 1 and self.advantage == "gae":
            return "values are computed for all minibatches before the critic's first optimizer step"
        return None
