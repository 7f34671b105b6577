"""Recipe keys of the algorithm: advantage, loss, correction, shaping (docs/algorithms.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from agentloop.config.section import Section


class CorrectionConfig(Section):
    """Correct for engine probabilities that differ from the trainer's or are of older weights."""

    decoupled: bool = Field(
        False,
        description="take the loss ratio against the proximal policy (the trainer's logprobs at the start of the step) "
        "instead of the engine's logprobs",
    )
    importance: Literal["none", "token", "sequence"] | None = Field(
        None,
        description="multiply each token's loss by proximal / engine probability; needs decoupled; null: token if "
        "decoupled, else none",
    )
    importance_cap: float | None = Field(2.0, gt=0, description="upper bound of that factor; null: no bound")
    mask: Literal["none", "token", "geometric"] = Field(
        "none",
        description="drop tokens by their proximal / engine probability ratio, or whole samples by its geometric mean",
    )
    mask_low: float | None = Field(None, ge=0, description="lowest ratio kept; null: 0.5 for token, 0.99 for geometric")
    mask_high: float | None = Field(None, gt=0, description="highest ratio kept; null: 5 for token, 1.01 for geometric")
    veto: float | None = Field(
        None, gt=0, lt=1, description="drop samples that have a token below this proximal / engine probability ratio"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> CorrectionConfig:
        if self.importance not in (None, "none") and not self.decoupled:
            raise ValueError(
                f"importance={self.importance} needs decoupled=true: a ratio against the engine's logprobs already "
                "contains that factor"
            )

        low, high = self.mask_bounds
        if self.mask != "none" and low >= high:
            raise ValueError(f"mask_low {low:g} is not below mask_high {high:g}")
        return self

    @property
    def mask_bounds(self) -> tuple[float, float]:
        """`mask_low` and `mask_high`, with the defaults of this mask for null."""
        low, high = (0.5, 5.0) if self.mask == "token" else (0.99, 1.01)
        return (
            low if self.mask_low is None else self.mask_low,
            high if self.mask_high is None else self.mask_high,
        )

    @property
    def effective_importance(self) -> Literal["none", "token", "sequence"]:
        """`importance`, with null resolved."""
        return self.importance or ("token" if self.decoupled else "none")

    @property
    def chosen(self) -> bool:
        """Whether any correction is on."""
        return self.decoupled or self.mask != "none" or self.veto is not None


class ShapingConfig(Section):
    """Adjust rewards for length and number of turns; off by default (docs/algorithms.md)."""

    overlong_buffer: int | None = Field(
        None,
        ge=1,
        description="the reward falls linearly over the last this many tokens before max_response_tokens; null: off",
    )
    overlong_penalty: float = Field(1.0, gt=0, description="how far the reward has fallen at max_response_tokens")
    wrong_reward: float | None = Field(
        None, lt=0, description="reward of an episode that earned 0 or less, e.g. -1; null: what it earned"
    )
    turn_bonus: float = Field(
        0.0,
        ge=0,
        description="added to wrong_reward for each turn after the first; can teach the policy to call tools endlessly",
    )
    turn_bonus_cap: float | None = Field(
        -0.6, le=0, description="upper bound of wrong_reward plus its bonus; null: 0, which is not safe"
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
        """Whether any shaping is on."""
        return self.overlong_buffer is not None or self.wrong_reward is not None


@dataclass(frozen=True)
class Needs:
    """The requirements of an advantage estimator on the rest of a run.

    Attributes:
        group_baseline: its baseline comes from the other episodes of the group, so a group has at
            least two.
        greedy_episode: each group gets one more episode, decoded greedily.
        step_rewards: it reads every step reward separately, not only an episode's reward.
        token_rewards: each token has a separate reward, so `gamma` applies.
        critic: it reads a value model, so `trainer.critic` and `lam` apply.
        whitened: its advantages are whitened over the batch unless `whiten` says otherwise.
    """

    group_baseline: bool = False
    greedy_episode: bool = False
    step_rewards: bool = False
    token_rewards: bool = False
    critic: bool = False
    whitened: bool = False


ESTIMATORS: dict[str, Needs] = {
    "grpo": Needs(group_baseline=True),
    "dr_grpo": Needs(group_baseline=True),
    "rloo": Needs(group_baseline=True),
    "grpo_process": Needs(step_rewards=True),
    "reinforce_pp": Needs(token_rewards=True, whitened=True),
    "reinforce_pp_baseline": Needs(group_baseline=True, whitened=True),
    "remax": Needs(greedy_episode=True),
    "gae": Needs(token_rewards=True, critic=True, whitened=True),
}
"""Every value of `advantage` and its needs.

To add an estimator, write its function in `trainer.algorithms.advantage` and add one row here. The
rest of the code reads the needs and never compares names.
"""

if TYPE_CHECKING:
    Advantage = str
else:
    Advantage = Literal[tuple(ESTIMATORS)]  # pydantic checks the value and lists the names when it refuses one


def estimators_with(need: str) -> str:
    """Name the estimators that need something: `"token_rewards"` -> `"reinforce_pp and gae"`."""
    return " and ".join(name for name, needs in ESTIMATORS.items() if getattr(needs, need))


class AlgorithmConfig(Section):
    """Advantage estimator and loss: formula, source and use of each value in docs/algorithms.md."""

    advantage: Advantage = Field(
        "grpo",
        description="grpo, dr_grpo, rloo: reward against the group's; grpo_process: each step reward against the "
        "group's; reinforce_pp: return, no baseline; reinforce_pp_baseline: group mean; remax: reward of a greedy "
        "episode; gae: a critic",
    )
    gamma: float = Field(1.0, gt=0, le=1, description="reinforce_pp, gae: discount from one sampled token to the next")
    lam: float = Field(1.0, ge=0, le=1, description="gae: 0 trusts the critic, 1 trusts the returns")
    whiten: bool | None = Field(
        None,
        description="whiten the advantages over the batch, which waits for its last group; null: on for reinforce_pp, "
        "reinforce_pp_baseline and gae",
    )
    dynamic_sampling: int = Field(
        0, ge=0, description="how often to replace a group with equal rewards by one of another prompt; 0: never"
    )
    shaping: ShapingConfig = Field(default_factory=ShapingConfig)
    loss: Literal["ppo_clip", "gspo", "cispo", "pg"] = Field("ppo_clip", description="policy loss")
    aggregation: Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "constant"] = Field(
        "token_mean", description="how token losses are reduced to one number"
    )
    aggregation_constant: float | None = Field(
        None, gt=0, description="aggregation=constant: divide each sequence's sum by this, then average over sequences"
    )
    clip_ratio_low: float = Field(0.2, ge=0, le=1, description="lower clip bound: ratio >= 1 - this")
    clip_ratio_high: float = Field(0.2, ge=0, description="upper clip bound: ratio <= 1 + this")
    clip_ratio_c: float | None = Field(None, gt=1, description="ppo_clip: dual clip for negative advantages; null: off")
    minibatches: int = Field(1, ge=1, description="optimizer steps per batch")
    kl_coef: float = Field(0.0, ge=0, description="weight of the KL to the initial policy; 0: keep no reference")
    kl_in: Literal["loss", "reward"] = Field("loss", description="add the KL to the loss, or subtract it from rewards")
    kl_estimator: Literal["k1", "k2", "k3", "low_var_kl"] = Field(
        "k3", description="KL estimate of each token; low_var_kl: k3, capped at 10"
    )
    kl_target: float | None = Field(
        None, gt=0, description="adapt kl_coef so that train/kl_ref approaches this, in nats per token; null: fixed"
    )
    kl_gain: float = Field(0.1, gt=0, lt=5, description="kl_target: how fast kl_coef adapts")
    entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    correction: CorrectionConfig = Field(default_factory=CorrectionConfig)

    @model_validator(mode="after")
    def _fits_together(self) -> AlgorithmConfig:
        if (self.aggregation == "constant") != (self.aggregation_constant is not None):
            raise ValueError(
                "aggregation=constant and aggregation_constant belong together, e.g. the agents' max_response_tokens"
            )
        if self.clip_ratio_c is not None and self.loss != "ppo_clip":
            raise ValueError(f"clip_ratio_c is read by ppo_clip, not by loss={self.loss}")

        if not self.kl_coef:
            for key in ("kl_in", "kl_target"):
                if getattr(self, key) not in ("loss", None):
                    raise ValueError(f"{key}={getattr(self, key)} needs a kl_coef above 0")
        if self.kl_in == "reward" and self.needs.step_rewards:
            raise ValueError(f"kl_in=reward cannot be combined with advantage={self.advantage}: use kl_in=loss")

        for key, need in (("gamma", "token_rewards"), ("lam", "critic")):
            if getattr(self, key) != 1 and not getattr(self.needs, need):
                raise ValueError(f"{key} is read by {estimators_with(need)}, not by advantage={self.advantage}")
        return self

    @property
    def needs(self) -> Needs:
        """The requirements of the chosen estimator."""
        return ESTIMATORS[self.advantage]

    @property
    def whitens(self) -> bool:
        """`whiten`, with null resolved."""
        return self.needs.whitened if self.whiten is None else self.whiten

    @property
    def needs_whole_batch(self) -> str | None:
        """Why training waits for a step's last group; None if it starts with the first."""
        if self.whitens:
            return "advantages are whitened over the batch"
        if self.minibatches > 1 and self.correction.chosen:
            return "the proximal policy is computed for all minibatches before the first optimizer step"
        if self.minibatches > 1 and self.needs.critic:
            return "values are computed for all minibatches before the critic's first optimizer step"
        return None
