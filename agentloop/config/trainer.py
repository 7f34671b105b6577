"""Keys of a recipe: the trainer's processes, optimizers, sharding, adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from agentloop.config.algorithm import AlgorithmConfig
from agentloop.config.section import Section


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
    reduce_each_micro_batch: bool = Field(
        True,
        description="ranks add up their gradients after each micro-batch, and each keeps its share; false: after the "
        "last one of a call, which exchanges less, and every rank holds the whole gradient until then",
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
    matmul: Literal["auto", "torch", "onednn"] = Field(
        "auto",
        description="device cpu: whose float32 products. torch: MKL's; onednn: oneDNN's, 1.4 to 1.9 times as fast "
        "where MKL does not use AVX-512, which is on processors that are not Intel's; auto: oneDNN's there",
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
