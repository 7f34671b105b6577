"""The recipe: every key a run has, its default and what it means. DESIGN section 6 names them.

A field's docstring-like `description` is its documentation: `agentloop config` and the docs print it, so no key can be
documented that does not exist, and no key exists undocumented.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are checked again when assigned."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class RunConfig(Section):
    """What this run is called, where it writes, how long it goes on."""

    name: str = Field("run", pattern=r"^[\w.-]+$", description="name of the run; letters, digits, . _ -")
    dir: Path | None = Field(None, description="run directory; null: outputs/<name>")
    steps: int | None = Field(None, ge=1, description="training steps; null: as many as `epochs` gives")
    epochs: int | None = Field(None, ge=1, description="passes over the training rows; used when `steps` is null")
    max_failed_fraction: float = Field(
        0.5, ge=0, le=1, description="end the run when more than this share of a step's episodes failed"
    )

    @model_validator(mode="after")
    def _has_an_end(self) -> RunConfig:
        if self.steps is None and self.epochs is None:
            raise ValueError("one of run.steps and run.epochs has to be set")
        return self


class ModelConfig(Section):
    """The policy."""

    path: str = Field(description="folder with a Hugging Face model and tokenizer, or a hub id")
    chat_template: Path | None = Field(None, description="Jinja file that replaces the tokenizer's own template")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="further variables of the template, e.g. {enable_thinking: false}"
    )
    tool_format: str | None = Field(None, description="parser of tool calls; null: found from the template")
    tool_role: Literal["tool", "user"] = Field(
        "tool",
        description="tool: results are the template's tool messages; user: they are users' messages, and the system "
        "message tells of the tools, for templates without tools",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute dtype of engine and trainer")


class DataConfig(Section):
    """Where the rows come from (docs/data.md)."""

    train: str | list[str] = Field(
        description="training rows, one or a list of: .jsonl and .parquet files, globs and folders of them, "
        "hub:owner/name[:config][@split], path.py:name, a name registered in agentloop.datasets"
    )
    val: str | list[str] | None = Field(None, description="validation rows, named alike; null: no evaluation")
    options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the functions and classes that train and val name"
    )
    default_agent: str = Field("tool_agent", description="agent loop for rows without an agent_name")
    max_prompt_tokens: int = Field(1024, ge=1, description="first prompt, tool schemas counted")
    overlong: Literal["drop", "error", "left", "right", "middle"] = Field(
        "drop",
        description="a row over max_prompt_tokens is left out; stops the run; or has its longest user text cut at that "
        "end, with a mark",
    )
    shuffle: bool = Field(True, description="shuffle the training rows anew each epoch")
    seed: int | None = Field(None, description="order of the rows; null: derived from `seed`")


class AgentConfig(Section):
    """Limits of one agent loop. What happens at each is a StopReason, counted in the metrics (docs/agents.md)."""

    max_assistant_turns: int = Field(4, ge=1, description="generations in one episode, forks included")
    max_user_turns: int | None = Field(
        None, ge=0, description="turns of a user or an environment after the first prompt; null: no limit"
    )
    max_turn_tokens: int | None = Field(
        None, ge=1, description="sampled tokens of one turn; null: sampling.max_new_tokens alone says it"
    )
    max_response_tokens: int = Field(256, ge=1, description="tokens after the first prompt, tool output included")
    max_episode_tokens: int | None = Field(
        None, ge=1, description="sampled tokens of one episode, forks included; null: no limit"
    )
    max_parallel_calls: int = Field(1, ge=1, description="tool calls of one turn that run at once")
    max_calls_per_turn: int = Field(8, ge=1, description="calls beyond it are answered with a message, not run")
    max_calls_per_episode: int | None = Field(
        None,
        ge=1,
        description="calls beyond it are answered with a message; a call after that ends the episode; null: no limit",
    )
    max_tool_response_tokens: int = Field(512, ge=16, description="longer tool output is cut, and the cut is marked")
    tool_timeout_s: float = Field(30.0, gt=0, description="seconds one tool call may take")
    interaction_timeout_s: float = Field(30.0, gt=0, description="seconds one answer of an interaction may take")
    episode_timeout_s: float | None = Field(None, gt=0, description="seconds one episode may take; null: no limit")
    options: dict[str, Any] = Field(default_factory=dict, description="free keys for the loop's own class")


class SamplingConfig(Section):
    """How turns are sampled. Penalties count the tokens of the present turn."""

    temperature: float = Field(1.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens of this total probability")
    top_k: int = Field(-1, ge=-1, description="-1: all tokens")
    min_p: float = Field(
        0.0, ge=0, le=1, description="leave out tokens less likely than this share of the likeliest one's probability"
    )
    repetition_penalty: float = Field(
        1.0, gt=0, le=2, description="divides positive logits of tokens sampled before, multiplies negative ones"
    )
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="subtracted from logits of tokens sampled before")
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="subtracted from a token's logit once for each time it was sampled"
    )
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="added to the logits of these token ids, e.g. {151643: -100}; null: none"
    )
    max_new_tokens: int = Field(64, ge=1, description="tokens of one turn at most")
    min_new_tokens: int = Field(
        0, ge=0, description="no turn ends by itself before so many tokens; fewer where limits leave less room"
    )

    @field_validator("min_new_tokens")
    @classmethod
    def _can_be_reached(cls, value: int, info: ValidationInfo) -> int:
        most = info.data.get("max_new_tokens", value)
        if value > most:
            raise ValueError(f"{value} is more than max_new_tokens {most}")
        return value


class PublishConfig(Section):
    """How a new policy version reaches the server."""

    transport: Literal["disk", "shm", "distributed"] = Field(
        "disk",
        description="disk: a folder of safetensors for each version; shm: shared memory, served where it lies; "
        "distributed: broadcast in a process group",
    )
    running: Literal["retract", "in_place", "wait"] = Field(
        "retract",
        description="requests that run during an update: recompute their KV cache, keep it, or let them end first",
    )
    folder: Path | None = Field(
        None,
        description="where published weights lie for disk and shm, and the copies of distributed; null: in memory "
        "(/dev/shm) if the run starts its server and they fit there, else the run's weights/",
    )
    bucket_mb: int = Field(256, ge=1, description="distributed: size at which one broadcast ends")
    address: str | None = Field(
        None, description="distributed: this machine as the server reaches it; null: loopback, or its host name"
    )


class RolloutConfig(Section):
    """The rollout server and what is asked of it."""

    engine: str = Field(
        "torch", description="torch: embedded engine; sglang: real SGLang; or a name registered in agentloop.engines"
    )
    url: str | None = Field(None, description="use this running server instead of starting one")
    host: str = Field("127.0.0.1", description="address the started server binds")
    port: int = Field(0, ge=0, le=65535, description="0: a free one")
    token: str | None = Field(None, description="bearer token; needed when host is not loopback")
    admin_token: str | None = Field(
        None, description="bearer token for pauses and weight updates; null: rollout.token serves for them too"
    )
    replicas: int = Field(1, ge=1, description="engines behind the router")
    python: str | None = Field(None, description="interpreter of SGLang's own environment; null: this one")
    engine_args: list[str] = Field(
        default_factory=list, description="passed on to SGLang, e.g. [--mem-fraction-static=0.7]"
    )
    gpus_per_replica: int = Field(1, ge=1, description="tensor parallelism of one SGLang replica")
    device: str = Field("cpu", description="device of the engine: cpu, cuda, cuda:1, ...")
    threads: int = Field(1, ge=1, description="intra-op threads of the server process")
    max_running: int = Field(64, ge=1, description="requests that decode at once in one replica")
    max_queue: int | None = Field(
        None, ge=0, description="requests that may wait; beyond, the server answers 503 and the client waits; null: any"
    )
    stream_tokens: int = Field(
        64, ge=0, description="sampled tokens of a request that are lost at most when its replica dies; 0: all"
    )
    probe_timeout_s: float = Field(
        20.0, gt=0, description="a replica that samples nothing for so long is taken for hung, and started again"
    )
    max_kv_tokens: int | None = Field(None, ge=256, description="KV cache slots of a replica; null: from max_running")
    context_length: int | None = Field(None, ge=16, description="null: the model's own")
    group_size: int = Field(8, ge=1, description="episodes per prompt")
    batch_size: int = Field(32, ge=1, description="prompts per step")
    max_concurrent: int = Field(256, ge=1, description="episodes in flight")
    max_loop_lag_s: float = Field(
        0.05, gt=0, description="when the agent loops' event loop is held up for longer, what did it is named"
    )
    max_staleness: int = Field(0, ge=0, description="versions a trained token may be behind; 0: exact on-policy")
    deterministic: Literal["auto"] | bool = Field(
        "auto",
        description="answers do not depend, to the bit, on what else is served: a resumed run then repeats one that "
        "was never stopped. auto: if max_staleness is 0 and the torch engine can (cpu, float32, one thread)",
    )
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    publish: PublishConfig = Field(default_factory=PublishConfig)
    request_timeout_s: float = Field(600.0, gt=0, description="one generation, waiting in the queue included")
    retries: int = Field(8, ge=0, description="how often a generation is sent again after a server failure")
    start_timeout_s: float = Field(600.0, gt=0, description="from the server's start to its first answer")
    max_restarts: int = Field(3, ge=0, description="how often a dead server is started again in one run")
    seed: int | None = Field(None, description="sampling; null: derived from `seed`")

    def determinism(self, dtype: str) -> Literal["off", "auto", "on"]:
        """The server's `--deterministic`, for a model in `dtype`."""
        if self.deterministic != "auto":
            return "on" if self.deterministic else "off"
        able = self.engine == "torch" and self.device == "cpu" and self.threads == 1 and dtype == "float32"
        return "auto" if able and self.max_staleness == 0 else "off"


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


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(1e-6, ge=0, description="peak learning rate")
    lr_end: float | None = Field(None, ge=0, description="learning rate at the last step; null: lr")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="from lr to lr_end")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, in optimizer steps")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's averaging of gradient and square")
    eps: float = Field(1e-8, gt=0, description="AdamW's denominator")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, on all parameters")
    grad_clip: float = Field(1.0, gt=0, description="global gradient norm at most")


class CriticConfig(Section):
    """The value model of `advantage: gae`: the policy's backbone, from the same path, with a head of one number."""

    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=1e-5))
    cliprange_value: float | None = Field(
        0.5, gt=0, description="a step moves a value by no more than this with a gradient; null: not clipped"
    )
    critic_warmup: int = Field(0, ge=0, description="steps at the start in which the critic alone is trained")


class FsdpConfig(Section):
    """How parameters are sharded."""

    reshard_after_forward: bool = Field(True, description="free gathered parameters between forward and backward")
    activation_checkpointing: bool = Field(
        False, description="keep only each block's input for the backward pass and compute the block again there"
    )
    offload_policy: bool = Field(
        False,
        description="device cuda: the policy's parameters, gradients and optimizer state live in host memory; the "
        "optimizer steps there. On the CPU they do anyway",
    )
    offload_reference: bool = Field(
        False, description="device cuda: the frozen reference's parameters live in host memory"
    )

    def offloads(self, *, reference: bool, device: str) -> bool:
        """Whether the policy, or the reference, lives in host memory while it is computed on `device`."""
        return device != "cpu" and (self.offload_reference if reference else self.offload_policy)


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685), null by default: only they are trained and saved, the base stays."""

    rank: int = Field(16, ge=1, description="rank of each adapter")
    alpha: float = Field(32.0, gt=0, description="an adapter's output counts alpha / rank times")
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="names of the linear layers that get one, as [q_proj, v_proj]; all-linear: all in "
        "the blocks of the language model"
    )  # fmt: skip
    exclude: list[str] = Field(default_factory=list, description="names that get none")


class TrainerConfig(Section):
    """The trainer's processes and maths."""

    ranks: int = Field(1, ge=1, description="FSDP2 worker processes")
    device: Literal["cpu", "cuda"] = Field("cpu", description="device of the ranks")
    threads: int = Field(1, ge=1, description="intra-op threads of each rank")
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    critic: CriticConfig | None = Field(None, description="needed by advantage=gae, and read by nothing else")
    fsdp: FsdpConfig = Field(default_factory=FsdpConfig)
    lora: LoraConfig | None = Field(None, description="train adapters only, merged when published; null: all weights")
    freeze_vision: bool = Field(True, description="vision-language models: the vision tower is not trained")
    attention: Literal["auto", "flash_attn", "torch", "plain"] = Field(
        "auto",
        description="auto: on CUDA flash-attn where it is installed, else torch's flash kernel; on the CPU torch's; "
        "plain: masked attention, for comparison",
    )
    liger: bool = Field(True, description="device cuda: liger-kernel's norm, rotation and MLP where it is installed")
    tokens_per_micro_batch: int = Field(8192, ge=64, description="packed tokens of one forward and backward")
    logprob_chunk: int = Field(1024, ge=16, description="tokens whose logits exist at one time")
    mismatch_warn: float = Field(
        0.05,
        gt=0,
        description="warn when the mean |logprob| difference of engine and trainer is above this and no "
        "algorithm.correction is chosen",
    )
    seed: int | None = Field(None, description="null: derived from `seed`")

    @model_validator(mode="after")
    def _has_its_critic(self) -> TrainerConfig:
        if self.algorithm.advantage == "gae" and self.critic is None:
            raise ValueError("algorithm.advantage=gae needs a critic: set trainer.critic, e.g. {optim: {lr: 1e-5}}")
        if self.algorithm.advantage != "gae" and self.critic is not None:
            raise ValueError(f"critic is read by advantage=gae, not by advantage={self.algorithm.advantage}")
        return self

    @property
    def critic_warmup(self) -> int:
        """Steps at the start in which the policy is not trained."""
        return self.critic.critic_warmup if self.critic is not None else 0

    @model_validator(mode="after")
    def _attention_fits_the_device(self) -> TrainerConfig:
        if self.attention in ("flash_attn", "torch") and self.device != "cuda":
            raise ValueError(
                f"trainer.attention={self.attention} is a CUDA kernel, trainer.device is {self.device}: leave it at "
                "auto"
            )
        return self


class EvalConfig(Section):
    """Evaluation on `data.val` with the same agent loops (docs/evaluation.md)."""

    before_train: bool = Field(True, description="evaluate version 0")
    every: int | None = Field(
        20, ge=1, description="evaluate after every so many steps, and after the last; null: never"
    )
    only: bool = Field(False, description="evaluate and stop")
    background: bool = Field(
        False,
        description="training goes on meanwhile: an evaluation may then span versions, eval/version_min to version_max",
    )
    max_rows: int | None = Field(None, ge=1, description="rows at most; null: all")
    max_concurrent: int | None = Field(
        None, ge=1, description="episodes in flight; null: rollout.max_concurrent, in the background a quarter of it"
    )
    sampling: SamplingConfig = Field(default_factory=lambda: SamplingConfig(temperature=0.0))
    n: int = Field(1, ge=1, description="episodes per row")
    pass_reward: float = Field(1.0, description="an episode with this reward or more passes, for pass@k")
    log_generations: int = Field(10, ge=0, description="evaluated episodes kept in the trace of a step")


class CheckpointConfig(Section):
    """What a stopped run resumes from."""

    every: int | None = Field(20, ge=1, description="save after every so many steps; always at the end and on Ctrl-C")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_best: int = Field(0, ge=0, description="best checkpoints kept beside them, by best_metric; 0: none")
    best_metric: str = Field(
        "eval/reward_mean", description="key of metrics.jsonl; a checkpoint of a step without it is never a best one"
    )
    best_is: Literal["highest", "lowest"] = Field("highest", description="which value of best_metric is the best")
    asynchronous: bool = Field(True, description="write while the next step goes on, from a copy in CPU memory")


class TraceConfig(Section):
    """What is written down of the episodes."""

    train_every: int = Field(1, ge=1, description="write traces/step_N/train.jsonl every so many steps")
    max_trajectories: int | None = Field(None, ge=1, description="trajectories of a step at most; null: all")
    print_every: int = Field(10, ge=0, description="print decoded sample episodes every so many steps; 0: never")
    print_samples: int = Field(2, ge=1, description="how many of them")


class RewardConfig(Section):
    """The reward function, and where it runs. A string instead of this section is its `function`."""

    function: str = Field(description="path.py:function, or a name registered in agentloop.rewards")
    run_in: Literal["thread", "process", "inline"] = Field(
        "thread",
        description="thread; process: killed when it takes too long, and it may crash; inline: on the event loop, for "
        "what returns at once. An async function runs on the event loop unless in a process",
    )
    workers: int | None = Field(None, ge=1, description="calls at once; null: 8 threads, or 2 processes")
    memory_mb: int | None = Field(None, ge=64, description="address space of a process; null: no limit")


class LoggerConfig(Section):
    """A place that metrics go to beside the console and metrics.jsonl. `name` alone and `{name: {options}}` will do."""

    name: str = Field(
        description="tensorboard, wandb, mlflow, trackio, or a name registered in agentloop.loggers (docs/metrics.md)"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the logger")


def _logger_sections(value: Any) -> Any:
    def section(entry: Any) -> Any:
        if isinstance(entry, str):
            return {"name": entry}
        if isinstance(entry, dict) and len(entry) == 1 and "name" not in entry:
            ((name, options),) = entry.items()
            return {"name": name, "options": options or {}}
        return entry

    return [section(entry) for entry in value] if isinstance(value, list) else value


class ClusterConfig(Section):
    """Where the processes run."""

    kind: Literal["local"] = Field("local", description="all processes on this machine")


class Recipe(Section):
    """A whole run."""

    seed: int = Field(0, ge=0, lt=2**31, description="data, rollout and trainer seeds derive from it")
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    agents: dict[str, AgentConfig] = Field(
        default_factory=dict, description="limits by agent name; an agent that is not named has the defaults"
    )
    tools: Path | None = Field(None, description="tool YAML")
    interactions: Path | None = Field(
        None, description="interactions YAML: simulated users that rows name; registered ones need none"
    )
    reward: RewardConfig | None = Field(
        None, description="scores an episode; null: the sum of its step rewards. A string is `reward.function`"
    )
    reward_timeout_s: float = Field(60.0, gt=0, description="seconds one reward may take")
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    trace: TraceConfig = Field(default_factory=TraceConfig)
    loggers: list[LoggerConfig] = Field(
        default_factory=list, description="where metrics go too, e.g. [tensorboard, {wandb: {project: x}}]"
    )
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    @field_validator("reward", mode="before")
    @classmethod
    def _named_reward(cls, value: Any) -> Any:
        return {"function": value} if isinstance(value, str) else value

    @field_validator("loggers", mode="before")
    @classmethod
    def _named_loggers(cls, value: Any) -> Any:
        return _logger_sections(value)

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.rollout.batch_size % self.trainer.algorithm.minibatches:
            raise ValueError(
                f"rollout.batch_size {self.rollout.batch_size} is not a multiple of "
                f"trainer.algorithm.minibatches {self.trainer.algorithm.minibatches}"
            )
        algorithm = self.trainer.algorithm
        if algorithm.advantage in WITH_GROUP_BASELINE and self.rollout.group_size < 2:
            raise ValueError(f"trainer.algorithm.advantage={algorithm.advantage} needs rollout.group_size >= 2")
        if algorithm.dynamic_sampling and self.rollout.group_size < 2:
            raise ValueError("trainer.algorithm.dynamic_sampling needs rollout.group_size >= 2")
        warmup = self.trainer.critic_warmup
        if self.run.steps is not None and warmup and warmup >= self.run.steps:
            raise ValueError(
                f"trainer.critic.critic_warmup {warmup} leaves no step of run.steps {self.run.steps} for the policy"
            )
        buffer = algorithm.shaping.overlong_buffer
        for name in (*self.agents, self.data.default_agent):
            limit = self.agent(name).max_response_tokens
            if buffer is not None and buffer >= limit:
                raise ValueError(
                    f"trainer.algorithm.shaping.overlong_buffer {buffer} is not below agents.{name}."
                    f"max_response_tokens {limit}"
                )
        if self.rollout.deterministic is True and self.rollout.engine != "torch":
            raise ValueError(f"rollout.deterministic needs engine torch, and rollout.engine is {self.rollout.engine}")
        return self

    def agent(self, name: str) -> AgentConfig:
        """The limits of agent `name`."""
        return self.agents.get(name) or AgentConfig()

    @property
    def run_dir(self) -> Path:
        return self.run.dir or Path("outputs") / self.run.name

    def seed_for(self, part: Literal["data", "rollout", "trainer"]) -> int:
        """The seed of a part: its own when named, else derived so that parts do not share a stream."""
        named = {"data": self.data.seed, "rollout": self.rollout.seed, "trainer": self.trainer.seed}[part]
        return named if named is not None else self.seed * 3 + ("data", "rollout", "trainer").index(part)


class SftStage(Section):
    """One stage of supervised fine-tuning: rows, an optimizer, a number of steps or of passes over the rows."""

    name: str = Field(pattern=r"^[\w.-]+$", description="name of the stage, for logs")
    data: str | list[str] = Field(
        description="rows {messages, tools?} (loss on assistant turns) or {text} (loss on all), from all that "
        "data.train of a training recipe may name"
    )
    steps: int | None = Field(None, ge=1, description="optimizer steps; null: as many as `epochs` gives")
    epochs: int | None = Field(None, ge=1, description="how often every row is seen; used when `steps` is null")
    batch_size: int = Field(32, ge=1, description="sequences per optimizer step")
    optim: OptimConfig = Field(default_factory=OptimConfig)

    @model_validator(mode="after")
    def _has_an_end(self) -> SftStage:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"stage {self.name}: one of steps and epochs has to be set")
        return self


class SftModel(Section):
    """The model that SFT starts from: a folder with weights, or one with a config only (`init: random`)."""

    path: str = Field(description="folder with config.json and tokenizer files; weights too unless init is random")
    init: Literal["weights", "random"] = Field("weights", description="random: weights drawn with `seed`")
    chat_template: Path | None = Field(
        None, description="Jinja file that replaces the tokenizer's own template; the finished model gets it too"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="further variables of the template, e.g. {enable_thinking: false}"
    )
    tool_role: Literal["tool", "user"] = Field(
        "tool", description="user: for templates without tools, as model.tool_role of a training recipe"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="compute dtype; master weights and optimizer are float32"
    )


class SftRunConfig(Section):
    """What this run is called and where it writes; its stages say how long it goes on."""

    name: str = Field("sft", pattern=r"^[\w.-]+$", description="name of the run; letters, digits, . _ -")
    dir: Path | None = Field(None, description="run directory; null: outputs/<name>")


class SftRecipe(Section):
    """`agentloop sft`: stages of supervised fine-tuning, one after the other."""

    seed: int = Field(0, ge=0, lt=2**31, description="initial weights and the order of the rows")
    run: SftRunConfig = Field(default_factory=SftRunConfig)
    prepare: str | None = Field(None, description="path.py:function called with the data folder before the first stage")
    model: SftModel
    stages: list[SftStage] = Field(min_length=1)
    shuffle: bool = Field(True, description="shuffle the rows of a stage anew each epoch")
    data_seed: int | None = Field(None, ge=0, description="order of the rows; null: `seed`")
    loss_aggregation: Literal["seq_mean", "token_mean"] = Field(
        "seq_mean", description="seq_mean: every sequence weighs the same, whatever its length"
    )
    max_tokens: int = Field(1024, ge=8, description="tokens of a sequence at most")
    overlong: Literal["error", "drop", "truncate"] = Field(
        "error",
        description="a row over max_tokens: error names it; drop leaves it out; truncate keeps its first turns, whole. "
        "What was left out is counted",
    )
    eval_data: str | list[str] | None = Field(
        None, description="held-out rows, whose loss is logged before the first step, between, and at the end"
    )
    eval_every: int | None = Field(None, ge=1, description="evaluate after every so many steps; null: start and end")
    eval_max_rows: int | None = Field(None, ge=1, description="rows of eval_data at most; null: all")
    tokens_per_micro_batch: int = Field(8192, ge=64, description="packed tokens of one forward and backward")
    logprob_chunk: int = Field(1024, ge=16, description="tokens whose logits exist at one time")
    log_every: int = Field(50, ge=1, description="print and record a line every so many steps")
    loggers: list[LoggerConfig] = Field(
        default_factory=list, description="where metrics go too, as in a training recipe, e.g. [tensorboard]"
    )
    checkpoint_every: int | None = Field(
        500, ge=1, description="save every so many steps; null: only at the end and on Ctrl-C"
    )
    checkpoint_keep: int = Field(2, ge=1, description="newest checkpoints kept")
    checkpoint_keep_best: int = Field(
        0, ge=0, description="checkpoints with the lowest eval/loss kept beside them, of steps that were evaluated"
    )
    threads: int = Field(1, ge=1, description="intra-op threads of each rank")
    device: Literal["cpu", "cuda"] = Field("cpu", description="device of the ranks")
    ranks: int = Field(1, ge=1, description="FSDP2 worker processes")
    fsdp: FsdpConfig = Field(default_factory=FsdpConfig)
    lora: LoraConfig | None = Field(None, description="train adapters only, merged in the finished model; null: all")
    out: Path | None = Field(None, description="folder of the finished model; null: <run dir>/model")

    @field_validator("loggers", mode="before")
    @classmethod
    def _named_loggers(cls, value: Any) -> Any:
        return _logger_sections(value)
