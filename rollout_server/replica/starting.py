"""Where replicas come from: the torch engine or SGLang as a child process, or a server that runs already."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from agentloop.errors import ServerStartError
from agentloop.runtime.child import Child, free_port
from rollout_server.engines.base import EngineError, EngineInfo
from rollout_server.errors import HttpError
from rollout_server.replica.base import Replica
from rollout_server.replica.http import HttpReplica
from rollout_server.replica.sglang import SglangReplica, sglang_command, sglang_environment
from rollout_server.settings import ServerSettings

REPLICA_TOKEN = "AGENTLOOP_REPLICA_TOKEN"  # noqa: S105  # the name of a variable, not a token


class _ChildSource:
    """What sources that start a process have in common."""

    def __init__(self, settings: ServerSettings, index: int, info: EngineInfo, log_dir: Path) -> None:
        self.name = f"{settings.engine}-{index}"
        self._settings = settings
        self._index = index
        self._info = info
        self._log_file = log_dir / f"replica-{index}.log"
        self._child: Child | None = None

    async def ended(self) -> str:
        assert self._child is not None
        return f"its process ended with code {await self._child.ended()}"

    async def stop(self, *, gently: bool) -> None:
        if self._child is not None:
            await (self._child.stop() if gently else self._child.kill())


class TorchSource(_ChildSource):
    """`python -m rollout_server` with the embedded engine, for one replica.

    Args:
        index: which of the replicas; they sample unseeded requests from streams of their own.
        token: between the two servers.
    """

    def __init__(self, settings: ServerSettings, index: int, info: EngineInfo, token: str, log_dir: Path) -> None:
        super().__init__(settings, index, info, log_dir)
        self._token = token
        self._ready_file = log_dir / f"replica-{index}.ready.json"

    async def start(self) -> Replica:
        settings = self._settings
        self._ready_file.unlink(missing_ok=True)
        device = settings.device
        if device == "cuda":
            device = f"cuda:{self._index}"
        command = [
            settings.python or sys.executable, "-P", "-m", "rollout_server",
            "--model", settings.model, "--engine", settings.engine, "--device", device, "--dtype", settings.dtype,
            "--max-running", str(settings.max_running), "--threads", str(settings.threads),
            "--weight-version", settings.first_version, "--seed", str(settings.seed + self._index),
            "--ready-file", str(self._ready_file), "--token-env", REPLICA_TOKEN, "--incremental-streaming-output",
            "--deterministic", settings.deterministic,
        ]  # fmt: skip
        for root in settings.weights_roots:
            command += ["--weights-root", str(root)]
        for option in ("max_kv_tokens", "context_length"):
            if (value := getattr(settings, option)) is not None:
                command += [f"--{option.replace('_', '-')}", str(value)]
        environment = {**os.environ, REPLICA_TOKEN: self._token}
        self._child = Child(f"replica {self.name}", command, environment, self._log_file)
        await self._child.until_ready(self._is_ready, settings.start_timeout_s)
        return HttpReplica(
            self.name,
            json.loads(self._ready_file.read_text())["url"],
            self._info,
            version=settings.first_version,
            token=self._token,
            stream_tokens=settings.stream_tokens,
            admin_timeout_s=settings.probe_timeout_s,
            update_timeout_s=settings.update_timeout_s,
        )

    async def _is_ready(self) -> bool:
        return self._ready_file.exists()

    async def stop(self, *, gently: bool) -> None:
        await super().stop(gently=gently)
        self._ready_file.unlink(missing_ok=True)


class SglangSource(_ChildSource):
    """SGLang's own server as a child, in its own Python environment."""

    async def start(self) -> Replica:
        settings = self._settings
        port = free_port()
        child = Child(
            f"replica {self.name}",
            sglang_command(settings, self._index, port),
            sglang_environment(settings, self._index),
            self._log_file,
        )
        self._child = child
        replica = SglangReplica(
            self.name,
            f"http://127.0.0.1:{port}",
            self._info,
            version=settings.first_version,
            stream_tokens=settings.stream_tokens,
            admin_timeout_s=settings.probe_timeout_s,
            update_timeout_s=settings.update_timeout_s,
        )
        try:
            await child.until_ready(replica.is_up, settings.start_timeout_s)
        except BaseException:
            await replica.close()
            raise
        replica.on_gpu = settings.device != "cpu"
        replica.tensor_parallel = settings.gpus_per_replica if replica.on_gpu else 1
        return replica


class UrlSource:
    """A server that somebody else started and keeps: an agentloop server or a bare SGLang."""

    def __init__(self, settings: ServerSettings, url: str, info: EngineInfo, token: str | None = None) -> None:
        self.name = url
        self._settings = settings
        self._info = info
        self._token = token

    async def start(self) -> Replica:
        settings = self._settings
        ours = HttpReplica(self.name, self.name, self._info, token=self._token)
        deadline = asyncio.get_running_loop().time() + settings.start_timeout_s
        try:
            while True:
                try:
                    facts = await ours.get("/server_info")
                    break
                except (EngineError, HttpError) as exc:
                    if asyncio.get_running_loop().time() > deadline or isinstance(exc, HttpError):
                        raise ServerStartError(
                            f"{self.name} is no rollout server that answers: {exc}", "start it, or correct the URL"
                        ) from exc
                    await asyncio.sleep(0.25)
        finally:
            await ours.close()
        # Answers in growing pieces cost a square of their length: only pieces that add up are asked for.
        incremental = bool(facts.get("incremental_streaming_output"))
        pieces = settings.stream_tokens if incremental else 0
        kind = HttpReplica if "engine" in facts else SglangReplica
        replica = kind(
            self.name,
            self.name,
            self._info,
            token=self._token,
            stream_tokens=pieces,
            incremental=incremental,
            admin_timeout_s=settings.probe_timeout_s,
            update_timeout_s=settings.update_timeout_s,
        )
        await replica.read_version()
        if isinstance(replica, SglangReplica):
            replica.on_gpu = facts.get("device") == "cuda"
            replica.tensor_parallel = int(facts.get("tp_size") or 1)
        return replica

    async def ended(self) -> str:
        await asyncio.Event().wait()  # nobody tells; the probes find out
        raise AssertionError("unreachable")

    async def stop(self, *, gently: bool) -> None:
        """It is not ours to stop."""
