"""Keys of a recipe: sampling, the rollout server, publishing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from agentloop.config.section import Section


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
