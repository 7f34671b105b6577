"""What one server process is told at its start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from agentloop.errors import ConfigError, ModelError
from agentloop.model_folder import ModelFolder

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ServerSettings(BaseModel):
    """Every option of `agentloop serve`, validated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="folder with a Hugging Face causal language model, or a hub id")
    engine: str = Field("torch", description="torch: the embedded engine; or a name registered in agentloop.engines")
    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535, description="0: a free one")
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_running: int = Field(64, ge=1, description="requests that decode at once")
    max_kv_tokens: int | None = Field(None, ge=16, description="KV cache in tokens; None: from max_running")
    context_length: int | None = Field(None, ge=16, description="None: the model's own")
    threads: int = Field(1, ge=1, description="intra-op threads")
    weights_roots: tuple[Path, ...] = Field((), description="folders that published weights may be loaded from")
    weight_version: str = "0"
    weights: Path | None = Field(None, description="published weights to start from instead of the model's own")
    ready_file: Path | None = None
    token: str | None = Field(None, repr=False)
    parent_pid: int | None = None
    seed: int = Field(0, ge=0, lt=2**63)
    replicas: int = Field(1, ge=1, le=1024, description="engines behind the router")
    replica_urls: tuple[str, ...] = Field((), description="servers that run already, instead of starting replicas")
    python: str | None = Field(None, description="interpreter of the engine's own environment")
    engine_args: tuple[str, ...] = Field((), description="passed on to SGLang's command line")
    gpus_per_replica: int = Field(1, ge=1, description="tensor parallelism of one SGLang replica")
    log_dir: Path | None = Field(None, description="replicas' logs; None: a temporary folder")
    max_queue: int | None = Field(None, ge=0, description="requests that may wait beyond those that run")
    stream_tokens: int = Field(64, ge=0, description="tokens of an answer lost at most with its replica; 0: all")
    incremental_streaming_output: bool = False
    probe_every_s: float = Field(2.0, gt=0)
    probe_timeout_s: float = Field(20.0, gt=0)
    start_timeout_s: float = Field(300.0, gt=0)
    update_timeout_s: float = Field(600.0, gt=0)
    drain_s: float = Field(10.0, ge=0, description="requests under way may end so long after SIGTERM")
    admin_token: str | None = Field(None, repr=False)
    deterministic: Literal["off", "auto", "on"] = Field(
        "off",
        description="a request's tokens and logprobs, to the bit, do not depend on what else is served. auto: where "
        "the torch engine can",
    )
    fast_path: bool = Field(True, description="the engine's own decoder for architectures it knows")

    @property
    def first_version(self) -> str:
        """What replicas call the weights that they start with: the model's own, which may not be the first to serve."""
        return self.weight_version if self.weights is None else "initial"

    @model_validator(mode="after")
    def _outside_needs_a_token(self) -> ServerSettings:
        if self.host not in LOOPBACK and not self.token:
            raise ConfigError(
                f"host {self.host} can be reached from other machines, and no token is set",
                "give --token-env NAME with a secret in that variable, or bind 127.0.0.1",
            )
        return self


def check_model(path: str) -> None:
    """Refuse at once what cannot be a model; engines find out the rest when they load it.

    Raises:
        ModelError: it is neither a model folder nor something like a hub id.
    """
    folder = Path(path)
    if folder.exists() and not ModelFolder(folder).has_config:
        raise ModelError(f"{path} is no model: it has no config.json", "give a folder with config.json and safetensors")
    if not folder.exists() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise ModelError(f"there is no model at {path}", "give a folder with config.json and safetensors, or a hub id")


def token_from_environment(option: str, name: str | None) -> str | None:
    """The bearer token in environment variable `name`, which was given as `--<option>`.

    Raises:
        ConfigError: the variable is named and empty.
    """
    if name is None:
        return None
    token = os.environ.get(name, "")
    if not token:
        raise ConfigError(f"--{option} {name}: that variable is not set", f"export {name}=<a long random string>")
    return token
