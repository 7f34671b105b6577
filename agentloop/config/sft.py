"""The recipe of `agentloop sft`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from agentloop.config.run import TRUST, LoggerConfig, logger_sections
from agentloop.config.section import FolderName, Processes, Section, Switch
from agentloop.config.trainer import FsdpConfig, LoraConfig, OptimConfig

TRAIN_ONLY = frozenset({"data", "rollout", "trainer", "agents", "reward"})
"""Sections by which a recipe of `agentloop train` is recognized."""


class SftStage(Section):
    """A stage of supervised fine-tuning: rows, an optimizer, and a number of steps or epochs."""

    name: FolderName = Field(description="name of the stage, for logs")
    data: str | list[str] = Field(
        description="rows {messages, tools?} (loss on assistant turns) or {text} (loss on all tokens), from any source "
        "that data.train of a training recipe accepts"
    )
    steps: int | None = Field(None, ge=1, description="optimizer steps; null: given by `epochs`")
    epochs: int | None = Field(None, ge=1, description="passes over the rows; used when `steps` is null")
    batch_size: int = Field(32, ge=1, description="sequences per optimizer step")
    optim: OptimConfig = Field(default_factory=OptimConfig)

    @model_validator(mode="after")
    def _has_an_end(self) -> SftStage:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"stage {self.name}: set either steps or epochs")
        return self


class SftModel(Section):
    """The initial model: a folder with weights, or with a config only (`init: random`)."""

    path: str = Field(description="folder with config.json and tokenizer files; weights too unless init is random")
    init: Literal["weights", "random"] = Field("weights", description="random: weights drawn with `seed`")
    chat_template: Path | None = Field(
        None, description="Jinja file that replaces the tokenizer's own template, also in the finished model"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="additional variables of the template, e.g. {enable_thinking: false}"
    )
    tool_role: Literal["tool", "user"] = Field(
        "tool", description="user: for templates without tools; see model.tool_role of a training recipe"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="compute dtype; master weights and optimizer are float32"
    )
    trust_remote_code: bool = Field(False, description=TRUST)


class SftRunConfig(Section):
    """Name and folder of the run."""

    name: FolderName = Field("sft", description="name of the run; letters, digits, . _ -")
    dir: Path | None = Field(None, description="run directory; null: outputs/<name>")


class SftRecipe(Section):
    """`agentloop sft`: consecutive stages of supervised fine-tuning."""

    KEYS_COMMAND: ClassVar[str] = "agentloop config --sft"

    seed: int = Field(0, ge=0, lt=2**31, description="initial weights and the order of the rows")
    run: SftRunConfig = Field(default_factory=SftRunConfig)
    prepare: str | None = Field(
        None, description="path.py:function, called with the data folder before the first stage"
    )
    model: SftModel
    stages: list[SftStage] = Field(min_length=1)
    shuffle: bool = Field(True, description="shuffle the rows of a stage, differently in each epoch")
    data_seed: int | None = Field(None, ge=0, description="order of the rows; null: `seed`")
    loss_aggregation: Literal["seq_mean", "token_mean"] = Field(
        "seq_mean", description="seq_mean: every sequence has the same weight; token_mean: every token"
    )
    max_tokens: int = Field(1024, ge=8, description="maximum tokens of a sequence")
    overlong: Literal["error", "drop", "truncate"] = Field(
        "error",
        description="a row over max_tokens: error stops and names it; drop leaves it out; truncate keeps its first "
        "turns, complete. Dropped and truncated rows are counted",
    )
    eval_data: str | list[str] | None = Field(
        None,
        description="held-out rows; their loss is logged at the start, every eval_every steps, and at the end",
    )
    eval_every: int | None = Field(None, ge=1, description="evaluate every N steps; null: only at start and end")
    eval_max_rows: int | None = Field(None, ge=1, description="maximum rows of eval_data; null: all")
    tokens_per_micro_batch: int = Field(8192, ge=64, description="packed tokens of one forward and backward pass")
    logprob_chunk: int = Field(1024, ge=16, description="tokens whose logits exist at the same time")
    log_every: int = Field(50, ge=1, description="print and record a line every N steps")
    loggers: list[LoggerConfig] = Field(
        default_factory=list, description="additional loggers, as in a training recipe, e.g. [tensorboard]"
    )
    checkpoint_every: int | None = Field(
        500, ge=1, description="save every N steps; null: only at the end and on Ctrl-C"
    )
    checkpoint_keep: int = Field(2, ge=1, description="newest checkpoints kept")
    checkpoint_keep_best: int = Field(
        0, ge=0, description="checkpoints with the lowest eval/loss kept in addition; only evaluated steps count"
    )
    threads: Processes = Field(1, description="intra-op threads of each rank")
    timeout_s: float = Field(1800.0, gt=0, description="seconds that the ranks may take for one command")
    device: Literal["cpu", "cuda"] = Field("cpu", description="device of the ranks")
    ranks: Processes = Field(1, description="FSDP2 worker processes")
    freeze_vision: bool = Field(True, description="vision-language models: do not train the vision tower")
    fsdp: FsdpConfig = Field(default_factory=FsdpConfig)
    lora: Annotated[LoraConfig | None, Switch] = Field(
        None, description="null, the default: train all weights. Adapters are merged into the finished model"
    )
    out: Path | None = Field(None, description="folder of the finished model; null: <run dir>/model")

    @model_validator(mode="before")
    @classmethod
    def _is_of_this_kind(cls, data: Any) -> Any:
        if isinstance(data, dict) and "stages" not in data and TRAIN_ONLY & data.keys():
            raise ValueError("this is a recipe of `agentloop train`, not of `agentloop sft`: it has no `stages`")
        return data

    @field_validator("loggers", mode="before")
    @classmethod
    def _named_loggers(cls, value: Any) -> Any:
        return logger_sections(value)
