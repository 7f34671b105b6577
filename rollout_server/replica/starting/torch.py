"""Replicas as `python -m rollout_server` child processes, each with one embedded engine."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from agentloop.config.server import ServerSettings
from agentloop.runtime.child import Child
from agentloop.runtime.early import EarlyProgram, begin_early
from rollout_server.engines.base import EngineInfo
from rollout_server.replica.base import Replica
from rollout_server.replica.http import HttpReplica
from rollout_server.replica.starting.base import ChildSource

MODULE = "rollout_server"
IMPORTS = ("rollout_server.launch", "rollout_server.engines.torch_engine.create")
REPLICA_TOKEN = "AGENTLOOP_REPLICA_TOKEN"  # noqa: S105  # the name of a variable, not a token


class TorchSource(ChildSource):
    """One replica as a separate rollout server.

    Args:
        token: bearer token between the two servers.
        others: as `ChildSource`. Replicas sample unseeded requests from different random streams,
            by `index`.
    """

    def __init__(self, settings: ServerSettings, index: int, info: EngineInfo, token: str, log_dir: Path) -> None:
        super().__init__(settings, index, info, log_dir)
        self._token = token
        self._ready_file = log_dir / f"replica-{index}.ready.json"
        self._settings_file = log_dir / f"replica-{index}.settings.json"

    async def start(self) -> Replica:
        settings = self._settings
        self._ready_file.unlink(missing_ok=True)
        file = replica_settings(settings, self._index, self._ready_file).save(self._settings_file)

        name, arguments, log = f"replica {self.name}", ["--settings", str(file)], self._log_file
        environment = {**os.environ, REPLICA_TOKEN: self._token}
        log_start = log.stat().st_size if log.exists() else 0
        begun = await begin_early(MODULE, arguments, environment, log)
        if begun is None:
            python = settings.python or sys.executable
            self._child = Child(name, [python, "-P", "-m", MODULE, *arguments], environment, log)
        else:
            self._child = Child(name, [], environment, log, early=begun[0], log_start=log_start)
        await self._child.until_ready(self._is_ready, settings.start_timeout_s)

        return HttpReplica(
            self.name,
            json.loads(self._ready_file.read_text())["url"],
            self._info,
            version=settings.first_version,
            token=self._token,
            stream_tokens=settings.stream_tokens,
            keeps_images=self._info.images,
            admin_timeout_s=settings.probe_timeout_s,
            update_timeout_s=settings.update_timeout_s,
        )

    async def _is_ready(self) -> bool:
        return self._ready_file.exists()

    async def stop(self, *, gently: bool) -> None:
        await super().stop(gently=gently)
        self._ready_file.unlink(missing_ok=True)


def early_replicas(settings: ServerSettings) -> list[EarlyProgram]:
    """Return the programs of the replicas that are forked from one process, which imports torch
    once for all of them."""
    # torch does not promise that a process may fork once CUDA libraries are loaded.
    forks = settings.engine == "torch" and settings.device == "cpu" and not settings.python
    if not forks or settings.replica_urls or settings.replicas == 1:
        return []
    return [EarlyProgram(MODULE, IMPORTS, dict(os.environ))] * settings.replicas


def replica_settings(settings: ServerSettings, index: int, ready_file: Path) -> ServerSettings:
    """Return the settings of replica `index`: the server's, adapted to a single process."""
    return settings.model_copy(
        update={
            "host": "127.0.0.1",
            "port": 0,
            "device": f"cuda:{settings.first_gpu + index}" if settings.device == "cuda" else settings.device,
            "seed": settings.seed + index,
            # It starts with the model's own weights; the router then brings it to the current
            # version.
            "weights": None,
            "weight_version": settings.first_version,
            # It is one embedded engine: limits, failover and other replicas are the business of
            # this server.
            "replicas": 1,
            "replica_urls": (),
            "replica_token_env": None,
            "max_queue": None,
            "incremental_streaming_output": True,
            "ready_file": ready_file,
            "token_env": REPLICA_TOKEN,
            "admin_token_env": None,
            "parent_pid": None,  # `Child` ties it to this process
        }
    )
