"""Every option of the rollout server, each in one place.

A field here is an option of `agentloop serve`, a key of the server's settings file and, in
`EngineOptions`, a key of a recipe's `rollout` section too. Its description is the help text of all
of them.
"""

from __future__ import annotations

import os
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from agentloop.config.section import Processes, Seconds, Section
from agentloop.errors import ConfigError
from agentloop.files import write_atomic
from agentloop.wire import WeightsVersion, bearer

DEVICES = r"^(cpu|cuda|xpu|mps|npu|hpu|mlu|musa)(:[0-9]{1,4})?$"
"""Devices that torch or SGLang know by name, with the number of one."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class EngineOptions(Section):
    """Options that a recipe's `rollout` section and the server share."""

    engine: str = Field(
        "torch", description="torch: embedded engine; sglang: real SGLang; or a name registered in agentloop.engines"
    )
    host: str = Field("127.0.0.1", description="address to bind; any but loopback needs a token")
    port: int = Field(0, ge=0, le=65535, description="0: a free one")
    replicas: int = Field(1, ge=1, le=1024, description="engines behind the router; several run as child processes")
    python: str | None = Field(None, description="interpreter of SGLang's own environment; null: this one")
    engine_args: list[str] = Field(
        default_factory=list, description="extra arguments of SGLang's server, e.g. --mem-fraction-static=0.7"
    )
    gpus_per_replica: Processes = Field(
        1, description="tensor parallelism of one SGLang replica; on the CPU, processes"
    )
    first_gpu: int = Field(
        0, ge=0, le=1024, description="device cuda: GPU of the first replica, after those of the trainer's ranks; the "
        "others follow"
    )  # fmt: skip
    device: str = Field("cpu", pattern=DEVICES, description="device of the engine: cpu, cuda, cuda:1, ...")
    threads: Processes = Field(1, description="intra-op threads of a replica")
    max_running: int = Field(64, ge=1, le=2**20, description="requests that decode at once in one replica; others wait")
    max_queue: int | None = Field(
        None, ge=0, description="requests that may wait; beyond, 503 with Retry-After; null: no limit"
    )
    stream_tokens: int = Field(
        64, ge=0, description="sampled tokens of a request that are lost at most when its replica dies; 0: all"
    )
    probe_timeout_s: Seconds = Field(
        20.0, description="seconds without a sampled token after which a replica counts as hung and is restarted"
    )
    max_kv_tokens: int | None = Field(
        None, ge=16, le=2**40, description="KV cache of a replica, in tokens; null: from max_running"
    )
    context_length: int | None = Field(
        None, ge=16, le=2**31, description="longest sequence; null: the model's own limit"
    )

    @field_validator("engine_args")
    @classmethod
    def _code_only_by_its_key(cls, value: list[str]) -> list[str]:
        if any(argument.startswith("--trust-remote-code") for argument in value):
            raise ValueError("set model.trust_remote_code (agentloop serve: --trust-remote-code) instead")
        return value

    def engine_options(self) -> dict[str, Any]:
        """Return the values of the shared options, by name."""
        return {name: getattr(self, name) for name in EngineOptions.model_fields}


class ServerSettings(EngineOptions):
    """All settings of one server process. They hold no secret: tokens stay in the environment."""

    model_config = ConfigDict(frozen=True)

    model: str = Field(description="folder with config.json and safetensors, or a hub id")
    replica_urls: tuple[str, ...] = Field(
        (), description="route to a server that already runs, instead of starting one"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the weights")
    trust_remote_code: bool = Field(
        False, description="run Python code that the model's folder brings (auto_map); else such a model is refused"
    )
    fast_path: bool = Field(True, description="use the torch engine's own decoder for architectures that it knows")
    deterministic: Literal["off", "auto", "on"] = Field(
        "off",
        description="on: answers do not depend, to the bit, on what else is served; auto: where the engine can; off",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of requests without a sampling_seed")
    incremental_streaming_output: bool = Field(
        False, description="events of a stream hold new tokens only, as with SGLang's option of this name"
    )
    clip_new_tokens: bool = Field(
        False,
        description="cut max_new_tokens to what the context leaves after the prompt, as SGLang's scheduler does; else "
        "such a request is a 400",
    )
    in_place_updates: bool = Field(
        False,
        description="start SGLang so that an in_place update names each token's version exactly: without its overlap "
        "scheduler, which samples one token ahead of its bookkeeping. Without it, SGLang refuses such updates",
    )
    memory_saver: bool = Field(
        False,
        description="let /release_memory_occupation release device memory for a trainer on the same device: SGLang "
        "(--enable-memory-saver) its weights and KV cache, the torch engine its KV cache",
    )
    weights_roots: tuple[Path, ...] = Field((), description="folder that /update_weights_from_disk may read")
    weight_version: WeightsVersion = Field("0", description="version name of the weights at the start")
    weights: Path | None = Field(None, description="published weights to start from; null: the model's own")
    update_timeout_s: Seconds = Field(600.0, description="seconds that a replica may take for a weight update")
    start_timeout_s: Seconds = Field(300.0, description="seconds that a replica may take to start")
    probe_every_s: Seconds = Field(2.0, description="seconds between two probes of a replica")
    max_connections: int = Field(
        8192,
        ge=1,
        le=2**20,
        description="open connections at most, within the limit of open files; beyond, 503 with Retry-After",
    )
    read_timeout_s: Seconds = Field(
        30.0, description="seconds in which a request's head must arrive; its body: one more for each 64 KiB"
    )
    drain_s: float = Field(10.0, ge=0, le=1e8, description="seconds that requests may take to end after SIGTERM")
    token_env: str | None = Field(None, description="environment variable that holds the bearer token")
    admin_token_env: str | None = Field(
        None, description="environment variable that holds a separate token for pauses, updates, aborts and memory"
    )
    replica_token_env: str | None = Field(
        None, description="environment variable that holds the bearer token of the servers at --replica-url"
    )
    ready_file: Path | None = Field(None, description="file to write {url, pid} to once it serves")
    log_dir: Path | None = Field(None, description="folder of the replicas' logs; null: a temporary folder")
    parent_pid: int | None = Field(None, description="process that this server must not outlive")

    def save(self, file: Path) -> Path:
        """Write the settings as JSON, for `python -m rollout_server --settings FILE`; returns
        `file`."""
        write_atomic(file, self.model_dump_json(indent=2).encode())
        return file

    @property
    def token(self) -> str | None:
        """The bearer token, from the environment.

        Raises:
            ConfigError: the variable is named but not set.
        """
        return _secret("token_env", self.token_env)

    @property
    def admin_token(self) -> str | None:
        """The token of administrative requests, from the environment.

        Raises:
            ConfigError: the variable is named but not set.
        """
        return _secret("admin_token_env", self.admin_token_env)

    @property
    def replica_token(self) -> str | None:
        """The token of the servers at `replica_urls`.

        Raises:
            ConfigError: the variable is named but not set.
        """
        return _secret("replica_token_env", self.replica_token_env)

    def most_in_flight(self, replicas: int) -> int | None:
        """Return the largest number of requests that a server with this number of replicas accepts
        at once; None: no limit."""
        return None if self.max_queue is None else self.max_running * replicas + self.max_queue

    def check_tokens(self) -> None:
        """Raise now, rather than at the first use, if a named token is not in the environment.

        Raises:
            ConfigError: the variable is named but not set, or no HTTP header can hold its value.
        """
        for field in ("token_env", "admin_token_env", "replica_token_env"):
            _secret(field, getattr(self, field))

    @property
    def first_version(self) -> str:
        """Version name of the weights that replicas start with: the model's own, not necessarily
        the first to serve."""
        return self.weight_version if self.weights is None else "initial"

    @classmethod
    def option(cls, field: str) -> str:
        """Return the command-line option of a field.

        `probe_timeout_s` is `--probe-timeout`; `weights_roots` is a repeated `--weights-root`.
        """
        name = field.removesuffix("_s")
        if typing.get_origin(cls.model_fields[field].annotation) in (list, tuple):
            name = name.removesuffix("s")
        return "--" + name.replace("_", "-")

    @model_validator(mode="after")
    def _protected(self) -> ServerSettings:
        if self.host not in LOOPBACK and not self.token_env:
            raise ConfigError(
                f"host {self.host} can be reached from other machines, and no token is set",
                "set one (rollout.token, or --token-env NAME with the token in that variable), or bind 127.0.0.1",
            )
        return self


def _secret(field: str, variable: str | None) -> str | None:
    if variable is None:
        return None
    value = os.environ.get(variable, "")
    if not value:
        raise ConfigError(
            f"{ServerSettings.option(field)} {variable}: that variable is not set",
            f"export {variable}=<a long random string>",
        )
    bearer(value, f"the token in {variable}")
    return value
