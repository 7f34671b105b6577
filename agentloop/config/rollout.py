"""Keys of a recipe: sampling, the rollout server, publishing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from agentloop.config.section import Seconds, Section
from agentloop.config.server import EngineOptions
from agentloop.wire import MaxNewTokens, SamplingFields


class SamplingConfig(SamplingFields, Section):
    """Sampling of turns. Penalties count the tokens of the current turn."""

    max_new_tokens: MaxNewTokens = 64


def _inherited(description: str) -> Any:
    return Field(None, description=f"{description}; null: as rollout.sampling")


class EvalSamplingConfig(Section):
    """Sampling of evaluations: greedy unless temperature is set, else as `rollout.sampling`.

    `Recipe.eval_sampling` resolves and bounds the values.
    """

    max_new_tokens: int | None = _inherited("sampled tokens of one turn at most")
    temperature: float | None = Field(0.0, description="0 is greedy; null: as rollout.sampling")
    top_p: float | None = _inherited("sample from the likeliest tokens of this total probability")
    top_k: int | None = _inherited("sample from this many of the likeliest tokens; -1: all")
    min_p: float | None = _inherited("drop tokens less likely than this share of the likeliest one's probability")
    repetition_penalty: float | None = _inherited("see rollout.sampling")
    presence_penalty: float | None = _inherited("see rollout.sampling")
    frequency_penalty: float | None = _inherited("see rollout.sampling")
    logit_bias: dict[int, float] | None = _inherited("added to the logits of these token ids; {}: none")
    min_new_tokens: int | None = _inherited("no end token before this many tokens")

    def over(self, base: SamplingConfig) -> SamplingConfig:
        """Return `base` with the values that are set here.

        Raises:
            ValidationError: a value is out of bounds.
        """
        named = {name: value for name, value in self if value is not None}
        return SamplingConfig.model_validate({**dict(base), **named})


class PublishConfig(Section):
    """Publishing of new policy versions to the server."""

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
        description="folder of the published weights of disk and shm, and of the copies of distributed; null: in "
        "memory (/dev/shm) if the run starts its server and they fit there, else the run's weights/",
    )
    bucket_mb: int = Field(256, ge=1, description="distributed: size at which one broadcast ends")
    address: str | None = Field(
        None, description="distributed: address of this machine for the server; null: loopback, or its host name"
    )


class RolloutConfig(EngineOptions):
    """The rollout server, and the requests of agent loops."""

    url: str | None = Field(None, description="use this running server instead of starting one")
    colocated: bool = Field(
        False,
        description="engine and trainer share their GPUs in turns: the engine releases its memory once a batch is "
        "sampled, and the trainer its own before the next one (docs/performance.md)",
    )
    token: str | None = Field(None, description="bearer token; needed when host is not loopback")
    admin_token: str | None = Field(
        None, description="bearer token for pauses and weight updates; null: rollout.token serves for them too"
    )
    group_size: int = Field(8, ge=1, description="episodes per prompt")
    batch_size: int = Field(32, ge=1, description="prompts per step")
    max_concurrent: int = Field(256, ge=1, description="episodes in flight")
    max_loop_lag_s: Seconds = Field(
        0.05, description="report what blocks the agent loops' event loop for longer than this"
    )
    max_staleness: int = Field(0, ge=0, description="versions a trained token may be behind; 0: exact on-policy")
    deterministic: Literal["auto"] | bool = Field(
        "auto",
        description="answers do not depend, to the bit, on what else is served: a resumed run then equals one that was "
        "never stopped. auto: if max_staleness is 0 and the torch engine can (cpu, float32, one thread)",
    )
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    publish: PublishConfig = Field(default_factory=PublishConfig)
    image_canary: bool = Field(
        True,
        description="rows with images: refuse to start if the served model answers the same with noise in their place",
    )
    request_timeout_s: Seconds = Field(600.0, description="timeout of one generation, its time in the queue included")
    retries: int = Field(8, ge=0, description="how often a generation is retried after a server failure")
    start_timeout_s: Seconds = Field(600.0, description="from the server's start to its first answer")
    max_restarts: int = Field(3, ge=0, description="how often a dead server is restarted in one run")
    seed: int | None = Field(None, ge=0, lt=2**63, description="seed of sampling; null: derived from `seed`")

    def determinism(self, dtype: str) -> Literal["off", "auto", "on"]:
        """Return the server's `deterministic` setting for a model in `dtype`."""
        if self.deterministic != "auto":
            return "on" if self.deterministic else "off"
        able = self.engine == "torch" and self.device == "cpu" and self.threads == 1 and dtype == "float32"
        return "auto" if able and self.max_staleness == 0 else "off"
