"""Recipe keys of the trainer: processes, optimizers, sharding, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from agentloop.config.algorithm import AlgorithmConfig, estimators_with
from agentloop.config.section import Processes, Section, Switch


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(1e-6, ge=0, description="peak learning rate")
    lr_end: float | None = Field(None, ge=0, description="learning rate at the last step; null: lr")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how the rate goes from lr to lr_end"
    )
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, in optimizer steps")
    betas: tuple[float, float] = Field(
        (0.9, 0.999), description="AdamW: decay of the averages of the gradient and its square"
    )
    eps: float = Field(1e-8, gt=0, description="AdamW: added to the denominator")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay on all parameters")
    grad_clip: float = Field(1.0, gt=0, description="clip the global gradient norm to this")


class CriticOptimConfig(OptimConfig):
    """AdamW of the value model."""

    lr: float = Field(1e-5, ge=0, description="peak learning rate")


class CriticConfig(Section):
    """The value model of `advantage: gae`: the policy's backbone with a scalar head."""

    optim: CriticOptimConfig = Field(default_factory=CriticOptimConfig)
    cliprange_value: float | None = Field(
        0.5, gt=0, description="clip the change of a value in one step to this, as PPO does; null: no clipping"
    )
    critic_warmup: int = Field(0, ge=0, description="initial steps that train only the critic")


class FsdpConfig(Section):
    """FSDP2 sharding."""

    reshard_after_forward: bool = Field(True, description="free gathered parameters between forward and backward")
    activation_checkpointing: bool = Field(
        False, description="keep only each block's input for the backward pass and recompute the block there"
    )
    reduce_each_micro_batch: bool = Field(
        True,
        description="reduce-scatter gradients after each micro-batch; false: only after the last one of a call, which "
        "communicates less while every rank holds the whole gradient until then",
    )
    offload_policy: bool = Field(
        False,
        description="device cuda: keep the policy's parameters, gradients and optimizer state in host memory and run "
        "the optimizer there",
    )
    offload_reference: bool = Field(
        False, description="device cuda: keep the frozen reference's parameters in host memory"
    )

    def offloads(self, *, reference: bool, device: str) -> bool:
        """Whether the policy (or the reference) is kept in host memory while `device` computes."""
        return device != "cpu" and (self.offload_reference if reference else self.offload_policy)


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685): train only them, freeze the base."""

    rank: int = Field(16, ge=1, description="rank of each adapter")
    alpha: float = Field(32.0, gt=0, description="scale an adapter's output by alpha / rank")
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="linear layers that get an adapter, e.g. [q_proj, v_proj]; all-linear: all in the "
        "language model's blocks"
    )  # fmt: skip
    exclude: list[str] = Field(default_factory=list, description="linear layers that get no adapter")
    adapters: Path | None = Field(
        None,
        description="run directory, or a checkpoint in one, whose adapters this run trains further, on the same "
        "model.path; null: new adapters, which change nothing at first",
    )


class TrainerConfig(Section):
    """The trainer: its processes, model and algorithm."""

    ranks: Processes = Field(1, description="FSDP2 worker processes")
    device: Literal["cpu", "cuda"] = Field("cpu", description="device of the ranks")
    threads: Processes = Field(1, description="intra-op threads of each rank")
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    critic: Annotated[CriticConfig | None, Switch] = Field(
        None, description="null, the default: no value model; advantage=gae requires one, the others do not use it"
    )
    fsdp: FsdpConfig = Field(default_factory=FsdpConfig)
    lora: Annotated[LoraConfig | None, Switch] = Field(
        None, description="null, the default: train all weights. Adapters are merged for publishing"
    )
    freeze_vision: bool = Field(True, description="vision-language models: do not train the vision tower")
    attention: Literal["auto", "flash_attn", "torch", "plain"] = Field(
        "auto",
        description="auto: on CUDA flash-attn if installed, else torch's flash kernel; on the CPU torch's kernel; "
        "plain: masked attention, for comparison",
    )
    matmul: Literal["auto", "torch", "onednn"] = Field(
        "auto",
        description="device cpu: float32 matmul kernels. torch: MKL; onednn: oneDNN, 1.4 to 1.9 times as fast on "
        "processors where MKL does not use AVX-512 (those not made by Intel); auto: oneDNN on those, else MKL",
    )
    liger: bool = Field(True, description="device cuda: use liger-kernel's norm, rotary embedding and MLP if installed")
    tokens_per_micro_batch: int = Field(8192, ge=64, description="packed tokens per forward and backward pass")
    logprob_chunk: int = Field(1024, ge=16, description="tokens whose logits are held in memory at once")
    mismatch_warn: float = Field(
        0.05,
        gt=0,
        description="warn when the mean |logprob| difference of engine and trainer exceeds this and no "
        "algorithm.correction is chosen",
    )
    timeout_s: float = Field(
        1800.0,
        gt=0,
        description="seconds that the ranks may take for one command (to load the model, a micro-batch, a checkpoint); "
        "the rank is lost then, and named",
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="how often a run goes on by itself from its last checkpoint after a rank was lost; only if a step "
        "was trained since the start",
    )
    seed: int | None = Field(None, description="null: derived from `seed`")

    @model_validator(mode="after")
    def _has_its_critic(self) -> TrainerConfig:
        chosen, needs_critic = self.algorithm.advantage, self.algorithm.needs.critic
        if needs_critic and self.critic is None:
            raise ValueError(
                f"algorithm.advantage={chosen} needs a critic: set trainer.critic, e.g. {{optim: {{lr: 1e-5}}}}"
            )
        if not needs_critic and self.critic is not None:
            raise ValueError(
                f"critic is read by advantage={estimators_with('critic')}, not by advantage={chosen}: remove it"
            )
        return self

    @property
    def critic_warmup(self) -> int:
        """Initial steps in which the policy is not trained."""
        return self.critic.critic_warmup if self.critic is not None else 0

    @model_validator(mode="after")
    def _attention_fits_the_device(self) -> TrainerConfig:
        if self.attention in ("flash_attn", "torch") and self.device != "cuda":
            raise ValueError(
                f"trainer.attention={self.attention} is a CUDA kernel and trainer.device is {self.device}: use auto"
            )
        return self
