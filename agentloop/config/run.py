"""Keys that recipes of training and of fine-tuning share, and those of a run: name, model, logs, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from agentloop.config.section import Section


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


class LoggerConfig(Section):
    """A place that metrics go to beside the console and metrics.jsonl. `name` alone and `{name: {options}}` will do."""

    name: str = Field(
        description="tensorboard, wandb, mlflow, trackio, or a name registered in agentloop.loggers (docs/metrics.md)"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the logger")


def logger_sections(value: Any) -> Any:
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
