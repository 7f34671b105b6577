"""Sections of a run: name, model, checkpoints, traces, loggers, cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from agentloop.config.section import FolderName, PlainAddress, Processes, Seconds, Section

Workers = Annotated[int, Field(ge=0, le=1024)]
"""A number of processes, or none."""


class RunConfig(Section):
    """Name, folder and length of the run."""

    name: FolderName = Field("run", description="name of the run; letters, digits, . _ -")
    dir: Path | None = Field(None, description="run directory; null: outputs/<name>")
    steps: int | None = Field(None, ge=1, description="training steps; null: given by `epochs`")
    epochs: int | None = Field(None, ge=1, description="passes over the training rows; used when `steps` is null")
    max_failed_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="end the run when more than this share of a step's episodes failed, or of those that called a tool "
        "that was away",
    )

    @model_validator(mode="after")
    def _has_an_end(self) -> RunConfig:
        if self.steps is None and self.epochs is None:
            raise ValueError("set run.steps or run.epochs")
        return self


TRUST = "run Python code that the model's folder brings (auto_map), with your rights; false: such a model is refused"


class ModelConfig(Section):
    """The policy."""

    path: str = Field(description="folder with a Hugging Face model and tokenizer, or a hub id")
    chat_template: Path | None = Field(None, description="Jinja file that replaces the tokenizer's own template")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="additional variables of the template, e.g. {enable_thinking: false}"
    )
    tool_format: str | None = Field(None, description="parser of tool calls; null: detected from the template")
    tool_role: Literal["tool", "user"] = Field(
        "tool",
        description="tool: results are tool messages of the template; user: results are user messages and the system "
        "message describes the tools, for templates without tools",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute dtype of engine and trainer")
    trust_remote_code: bool = Field(False, description=TRUST)


class CheckpointConfig(Section):
    """Checkpoints, from which a stopped run resumes."""

    every: int | None = Field(20, ge=1, description="save every N steps; also at the end and on Ctrl-C")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_best: int = Field(0, ge=0, description="best checkpoints kept in addition, by best_metric; 0: none")
    best_metric: str = Field(
        "eval/reward_mean",
        description="key of metrics.jsonl; a checkpoint of a step without this key is never a best one",
    )
    best_is: Literal["highest", "lowest"] = Field("highest", description="which value of best_metric is best")
    asynchronous: bool = Field(True, description="write during the next step, from a copy in CPU memory")


class SpanSampling(Section):
    """Which groups of a step are sent. The choice depends on step and group only."""

    sample_rate: float = Field(1.0, ge=0, le=1, description="share of the groups that are sent")
    max_groups_per_step: int | None = Field(None, ge=1, description="groups of a step that are sent; null: all")


class OtlpConfig(SpanSampling):
    """OpenTelemetry receiver: MLflow, Phoenix, Jaeger, Grafana (docs/traces.md)."""

    endpoint: PlainAddress = Field(description="address of the receiver; /v1/traces is added unless it ends so")
    headers: dict[str, str] = Field(
        default_factory=dict, description="headers of each request, e.g. {authorization: ...}; never written to a file"
    )
    timeout_s: Seconds = Field(10.0, description="time limit of one request, its retries included")
    texts: bool = Field(True, description="send prompts, answers and tool results; false: names, times and numbers")


class WeaveConfig(SpanSampling):
    """Weights & Biases Weave (docs/traces.md)."""

    project: str = Field(min_length=1, description="project; entity/project is accepted too")
    entity: str | None = Field(None, description="team or user; null: the default of the account")
    token2text: bool = Field(True, description="send prompts and answers as text; false: without them")
    max_groups_per_step: int | None = Field(16, ge=1, description="groups of a step that are sent; null: all")


class ExporterConfig(SpanSampling):
    """A destination of spans that a package registers in agentloop.traces."""

    name: str = Field(description="name registered in agentloop.traces")
    options: dict[str, Any] = Field(
        default_factory=dict, description="what the exporter needs to know; it reads config.options"
    )


class TraceConfig(Section):
    """Record of the episodes."""

    train_every: int = Field(1, ge=1, description="write traces/step_N/train.parquet every N steps")
    max_bytes_per_step: int | None = Field(
        256 << 20,
        ge=1,
        description="bytes of a step's trace; further groups are left out, chosen by seed and step, except failed and "
        "rejected episodes, and are not sent anywhere either; null: no limit",
    )
    print_every: int = Field(10, ge=0, description="print decoded sample episodes every N steps; 0: never")
    print_samples: int = Field(2, ge=1, description="number of sample episodes printed")
    otlp: OtlpConfig | None = Field(None, description="null, the default: send no spans to one")
    weave: WeaveConfig | None = Field(None, description="null, the default: send no episodes to it")
    exporters: list[ExporterConfig] = Field(default_factory=list, description="further destinations of spans")


class LoggerConfig(Section):
    """A logger beside console and metrics.jsonl. Short forms: `name`, `{name: {options}}`."""

    name: str = Field(
        description="tensorboard, wandb, mlflow, trackio, or a name registered in agentloop.loggers (docs/metrics.md)"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the logger")


def logger_sections(value: Any) -> Any:
    """Expand the short forms of `loggers`; a single logger is a list of one."""

    def section(entry: Any) -> Any:
        if isinstance(entry, str):
            return {"name": entry}
        if isinstance(entry, dict) and len(entry) == 1 and "name" not in entry:
            ((name, options),) = entry.items()
            return {"name": name, "options": {} if options is None else options}
        return entry

    if value is None:
        return []
    if isinstance(value, str | dict):
        value = [value]
    return [section(entry) for entry in value] if isinstance(value, list) else value


class AgentWorkersConfig(Section):
    """Processes that run episodes (docs/agent_workers.md)."""

    workers: Workers = Field(
        0,
        description="processes that run agent loops, tools and rewards; 0: they run in the main process. More than one "
        "helps when they compute in Python, which uses one core a process",
    )
    max_restarts: int = Field(
        3, ge=0, description="how often in a row a worker may die without having finished an episode in between"
    )
    cpus: float = Field(1.0, ge=0, le=4096, description="kind ray: CPUs that are reserved for each worker")


class ClusterConfig(Section):
    """Where the processes of a run are (docs/cluster.md)."""

    kind: Literal["local", "ray"] = Field(
        "local", description="local: child processes on this machine; ray: placed on the nodes of a Ray cluster"
    )
    address: str | None = Field(
        None,
        pattern=r"^(auto|[^\s:/]+:[0-9]{1,5})$",
        description="kind ray: host:port of a running cluster, or auto: the one of this machine or of RAY_ADDRESS; "
        "null: start one on this machine for the run",
    )
    nodes: Processes = Field(
        1, description="kind ray: nodes that trainer.ranks are divided over; those of one node are placed together"
    )
    timeout_s: Seconds = Field(300.0, description="kind ray: how long to wait for room on the cluster")
    env: dict[str, str] = Field(
        default_factory=dict,
        description="kind ray: environment variables of all processes, over those of their node; kept in the run's "
        "config, so no place for secrets",
    )
    agents: AgentWorkersConfig = Field(default_factory=AgentWorkersConfig)

    @model_validator(mode="after")
    def _is_read(self) -> ClusterConfig:
        if self.kind == "local":
            for name in ("address", "nodes", "env"):
                if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                    raise ValueError(f"cluster.{name} is for cluster.kind=ray")
        return self
