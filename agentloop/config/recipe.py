"""The recipe of `agentloop train`: every key of a run, its default and its meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from agentloop.config.rollout import EvalSamplingConfig, RolloutConfig, SamplingConfig
from agentloop.config.run import (
    CheckpointConfig,
    ClusterConfig,
    LoggerConfig,
    ModelConfig,
    RunConfig,
    TraceConfig,
    logger_sections,
)
from agentloop.config.section import Processes, Seconds, Section
from agentloop.config.trainer import TrainerConfig


class DataConfig(Section):
    """The data sets (docs/data.md)."""

    train: str | list[str] = Field(
        description="training rows, one or a list of: .jsonl and .parquet files, globs and folders of them, "
        "hub:owner/name[:config][@split], path.py:name, a name registered in agentloop.datasets"
    )
    val: str | list[str] | None = Field(None, description="validation rows, in the same forms; null: no evaluation")
    options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments for the functions and classes named in train and val"
    )
    default_agent: str = Field(
        "tool_agent", description="agent loop for rows without an agent_name: a name of `agents`, a registered name, "
        "or path.py:Class"
    )  # fmt: skip
    max_prompt_tokens: int = Field(1024, ge=1, description="limit of the first prompt, tool schemas included")
    overlong: Literal["drop", "error", "left", "right", "middle"] = Field(
        "drop",
        description="what to do with a row over max_prompt_tokens: leave it out, stop the run, or cut its longest user "
        "text at that side, with a mark",
    )
    shuffle: bool = Field(True, description="shuffle the training rows in each epoch")
    seed: int | None = Field(None, description="seed of the row order; null: derived from `seed`")


class AgentConfig(Section):
    """Limits of one agent loop; reaching one is a StopReason (docs/agents.md)."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    class_: str | None = Field(
        None, alias="class", description="path.py:Class, module.path.Class or a registered name; null: the agent that "
        "is registered as <name>"
    )  # fmt: skip
    max_assistant_turns: int = Field(4, ge=1, description="generations per episode, forks included")
    max_user_turns: int | None = Field(
        None, ge=0, description="turns of a user or an environment after the first prompt; null: no limit"
    )
    max_turn_tokens: int | None = Field(
        None, ge=1, description="sampled tokens per turn; null: only sampling.max_new_tokens applies"
    )
    max_response_tokens: int = Field(256, ge=1, description="tokens after the first prompt, tool output included")
    max_episode_tokens: int | None = Field(
        None, ge=1, description="sampled tokens per episode, forks included; null: no limit"
    )
    max_parallel_calls: int = Field(1, ge=1, description="tool calls of one turn that run concurrently")
    max_calls_per_turn: int = Field(
        8, ge=1, description="further calls of a turn get an error message instead of a result"
    )
    max_calls_per_episode: int | None = Field(
        None,
        ge=1,
        description="calls beyond it get an error message; a call after that ends the episode; null: no limit",
    )
    max_tool_response_tokens: int = Field(512, ge=16, description="longer tool output is cut, with a mark")
    tool_timeout_s: Seconds = Field(30.0, description="time limit of one tool call, in seconds")
    interaction_timeout_s: Seconds = Field(30.0, description="time limit of one reply of an interaction, in seconds")
    episode_timeout_s: Seconds | None = Field(None, description="time limit of one episode, in seconds; null: no limit")
    options: dict[str, Any] = Field(default_factory=dict, description="free-form keys for a custom agent class")


class EvalConfig(Section):
    """Evaluation on `data.val` with the same agent loops (docs/evaluation.md)."""

    before_train: bool = Field(True, description="evaluate version 0")
    every: int | None = Field(20, ge=1, description="evaluate every this many steps, and after the last; null: never")
    only: bool = Field(False, description="evaluate and stop")
    background: bool = Field(
        False,
        description="keep training meanwhile; an evaluation can then span versions eval/version_min to version_max",
    )
    max_rows: int | None = Field(None, ge=1, description="evaluate at most this many rows; null: all")
    max_concurrent: int | None = Field(
        None, ge=1, description="episodes in flight; null: rollout.max_concurrent, or a quarter of it in the background"
    )
    sampling: EvalSamplingConfig = Field(default_factory=EvalSamplingConfig)
    n: int = Field(1, ge=1, description="episodes per row")
    pass_reward: float = Field(1.0, description="an episode with this reward or more passes, for pass@k")
    log_generations: int = Field(10, ge=0, description="episodes kept in the trace of an evaluation")


class RewardConfig(Section):
    """The reward function and where it runs. A string instead of a section is its `function`."""

    function: str = Field(description="path.py:function, or a name registered in agentloop.rewards")
    run_in: Literal["thread", "process", "inline"] = Field(
        "thread",
        description="thread; process: killed at the time limit, may crash safely; inline: on the event loop, for "
        "functions that return at once. An async function runs on the event loop unless run_in is process",
    )
    workers: Processes | None = Field(None, description="concurrent calls; null: 8 threads, or 2 processes")
    memory_mb: int | None = Field(None, ge=64, le=2**40, description="address space limit of a process; null: no limit")


class Recipe(Section):
    """A whole run."""

    seed: int = Field(0, ge=0, lt=2**31, description="data, rollout and trainer seeds derive from it")
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    agents: dict[str, AgentConfig] = Field(
        default_factory=dict, description="limits by agent name; agents not listed have the defaults"
    )
    tools: Path | None = Field(None, description="tool YAML")
    interactions: Path | None = Field(
        None, description="interactions YAML: simulated users named by rows; registered ones need no entry"
    )
    reward: RewardConfig | None = Field(
        None, description="null, the default: the score of an episode is the sum of its step rewards"
    )
    reward_timeout_s: Seconds = Field(60.0, description="time limit of one reward call, in seconds")
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    trace: TraceConfig = Field(default_factory=TraceConfig)
    loggers: list[LoggerConfig] = Field(
        default_factory=list, description="further destinations of metrics, e.g. [tensorboard, {wandb: {project: x}}]"
    )
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    _folder: Path = PrivateAttr(default_factory=Path)

    def model_post_init(self, context: Any) -> None:
        """Keep the folder of the recipe's file, which `load_config` passes as context."""
        self._folder = (context or {}).get("folder") or Path()

    @model_validator(mode="before")
    @classmethod
    def _is_of_this_kind(cls, data: Any) -> Any:
        if isinstance(data, dict) and "stages" in data:
            raise ValueError("this is a recipe of `agentloop sft`, not of `agentloop train`: it has `stages`")
        return data

    @field_validator("reward", mode="before")
    @classmethod
    def _named_reward(cls, value: Any) -> Any:
        return {"function": value} if isinstance(value, str) else value

    @field_validator("loggers", mode="before")
    @classmethod
    def _named_loggers(cls, value: Any) -> Any:
        return logger_sections(value)

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.rollout.batch_size % self.trainer.algorithm.minibatches:
            raise ValueError(
                f"rollout.batch_size {self.rollout.batch_size} is not a multiple of "
                f"trainer.algorithm.minibatches {self.trainer.algorithm.minibatches}"
            )

        algorithm = self.trainer.algorithm
        if algorithm.needs.group_baseline and self.rollout.group_size < 2:
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

        try:
            _ = self.eval_sampling
        except ValidationError as exc:
            first = exc.errors(include_url=False)[0]
            raise ValueError(
                f"eval.sampling, with what it takes from rollout.sampling: {'.'.join(map(str, first['loc']))}: "
                f"{first['msg'].removeprefix('Value error, ')}"
            ) from exc

        if self.rollout.colocated:
            self._check_colocated()
        if self.cluster.nodes > self.trainer.ranks:
            raise ValueError(f"cluster.nodes {self.cluster.nodes} is more than trainer.ranks {self.trainer.ranks}")
        if self.rollout.deterministic is True and self.rollout.engine != "torch":
            raise ValueError(f"rollout.deterministic=true needs rollout.engine=torch, not {self.rollout.engine}")
        return self

    def _check_colocated(self) -> None:
        """Refuse what would sample while the trainer has the GPUs.

        Raises:
            ValueError: names the key and the value that it needs.
        """
        fault = None
        if self.cluster.kind == "ray":
            fault = "cluster.kind=local: on Ray, ranks and engines have GPUs of their own"
        elif self.rollout.max_staleness:
            fault = f"rollout.max_staleness=0, not {self.rollout.max_staleness}: nothing is sampled during training"
        elif self.eval.background:
            fault = "eval.background=false: nothing is sampled during training"
        elif self.rollout.publish.transport == "distributed":
            fault = "rollout.publish.transport disk or shm: NCCL does not connect two processes on one GPU"
        elif self.rollout.engine == "sglang" and self.rollout.device == "cpu":
            fault = "rollout.device=cuda: SGLang on a CPU cannot release its memory"
        if fault is not None:
            raise ValueError(f"rollout.colocated needs {fault}")

    @property
    def folder(self) -> Path:
        """Folder of the recipe's file; the working directory if there is no file."""
        return self._folder

    @property
    def eval_sampling(self) -> SamplingConfig:
        """Sampling of evaluations: `eval.sampling`, with `rollout.sampling` for null."""
        return self.eval.sampling.over(self.rollout.sampling)

    def plain(self) -> dict[str, Any]:
        """Return the values as JSON data without secrets; sampling of evaluations is resolved."""
        data = super().plain()
        data["eval"]["sampling"] = self.eval_sampling.plain()
        return data

    def agent(self, name: str) -> AgentConfig:
        """Return the limits of agent `name`."""
        return self.agents.get(name) or AgentConfig()

    @property
    def run_dir(self) -> Path:
        """`run.dir`, or `outputs/<run.name>` when that is null."""
        return self.run.dir or Path("outputs") / self.run.name

    def seed_for(self, part: Literal["data", "rollout", "trainer"]) -> int:
        """Return a part's seed: the configured one, or one derived from `seed` for that part."""
        named = {"data": self.data.seed, "rollout": self.rollout.seed, "trainer": self.trainer.seed}[part]
        return named if named is not None else self.seed * 3 + ("data", "rollout", "trainer").index(part)
