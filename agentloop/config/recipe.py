"""The recipe of `agentloop train`: every key a run has, its default and what it means. DESIGN section 6 names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from agentloop.config.algorithm import WITH_GROUP_BASELINE
from agentloop.config.rollout import RolloutConfig, SamplingConfig
from agentloop.config.run import (
    CheckpointConfig,
    ClusterConfig,
    LoggerConfig,
    ModelConfig,
    RunConfig,
    TraceConfig,
    logger_sections,
)
from agentloop.config.section import Section
from agentloop.config.trainer import TrainerConfig


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
        return logger_sections(value)

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
