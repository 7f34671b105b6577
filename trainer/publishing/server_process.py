"""The rollout server as a child of the run: started, watched, started again at the version it had to serve.

The server is a program of its own, started by name: nothing of `rollout_server` is imported here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from agentloop.config import ModelConfig, RolloutConfig
from agentloop.errors import ConfigError, ServerStartError
from agentloop.runtime.child import Child, child_environment, log_tail

ADMIN_TOKEN_VARIABLE = "AGENTLOOP_SERVER_ADMIN_TOKEN"  # noqa: S105  # as the next one
TOKEN_VARIABLE = "AGENTLOOP_SERVER_TOKEN"  # noqa: S105  # the name of a variable, not a token


class ServerProcess:
    """One rollout server under supervision.

    `restarts` counts how often it was started again after it died. `died` is set, with the reason, when it is given up.
    """

    def __init__(
        self,
        *,
        model_path: str,
        model: ModelConfig,
        rollout: RolloutConfig,
        seed: int,
        log_file: Path,
        weights_roots: Sequence[Path],
        on_restart: Callable[[str], None],
    ) -> None:
        self._model_path = model_path
        self._model = model
        self._rollout = rollout
        self._seed = seed
        self._log_file = log_file
        self._weights_roots = list(weights_roots)
        self._on_restart = on_restart
        self._ready_file = log_file.with_name("server.ready.json")
        self._port = rollout.port
        self._child: Child | None = None
        self._watch: asyncio.Task[None] | None = None
        self._weights: tuple[int, Path | None] = (0, None)
        self.restarts = 0
        self.died: asyncio.Future[None] | None = None
        self.url = ""

    async def start(self, version: int, weights: Path | None) -> str:
        """Start and wait until it serves `version`; returns its URL.

        Args:
            version: policy version of the weights.
            weights: published folder to serve; None: the model's own.

        Raises:
            ServerStartError: it died or did not answer in time; the last lines of its log are in the message.
        """
        self._weights = (version, weights)
        self.died = asyncio.get_running_loop().create_future()
        await self._launch()
        self._watch = asyncio.create_task(self._supervise(), name="watch the rollout server")
        return self.url

    def serves(self, version: int, weights: Path) -> None:
        """Tell which weights a restarted server has to start from."""
        self._weights = (version, weights)

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

    async def stop(self) -> None:
        """Ask it to end, then make it."""
        if self._watch:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if self._child is not None:
            await self._child.stop()

    async def _is_ready(self) -> bool:
        return self._ready_file.exists()

    async def _launch(self) -> None:
        version, weights = self._weights
        rollout = self._rollout
        self._ready_file.unlink(missing_ok=True)
        command = [
            sys.executable, "-P", "-m", "rollout_server",
            "--model", self._model_path, "--engine", rollout.engine, "--host", rollout.host, "--port", str(self._port),
            "--device", rollout.device, "--dtype", self._model.dtype, "--max-running", str(rollout.max_running),
            "--threads", str(rollout.threads),
            "--weight-version", str(version), "--seed", str(self._seed), "--ready-file", str(self._ready_file),
            "--parent-pid", str(os.getpid()), "--replicas", str(rollout.replicas),
            "--gpus-per-replica", str(rollout.gpus_per_replica), "--stream-tokens", str(rollout.stream_tokens),
            "--probe-timeout", str(rollout.probe_timeout_s), "--start-timeout", str(0.9 * rollout.start_timeout_s),
            "--log-dir", str(self._log_file.parent), "--deterministic", rollout.determinism(self._model.dtype),
        ]  # fmt: skip
        command += [f"--engine-arg={argument}" for argument in rollout.engine_args]
        if rollout.python is not None:
            command += ["--python", rollout.python]
        if rollout.max_queue is not None:
            command += ["--max-queue", str(rollout.max_queue)]
        for root in self._weights_roots:
            command += ["--weights-root", str(root)]
        if weights is not None:
            command += ["--weights", str(weights)]
        if rollout.max_kv_tokens is not None:
            command += ["--max-kv-tokens", str(rollout.max_kv_tokens)]
        if rollout.context_length is not None:
            command += ["--context-length", str(rollout.context_length)]
        environment = child_environment(rollout.threads)
        for option, variable, token in (
            ("--token-env", TOKEN_VARIABLE, rollout.token),
            ("--admin-token-env", ADMIN_TOKEN_VARIABLE, rollout.admin_token),
        ):
            if token:
                command += [option, variable]
                environment[variable] = token
        self._child = Child("the rollout server", command, environment, self._log_file)
        try:
            await self._child.until_ready(
                self._is_ready, rollout.start_timeout_s, timeout_key="rollout.start_timeout_s"
            )
        except ServerStartError:
            await self._child.stop()
            raise
        ready = json.loads(self._ready_file.read_text())
        self.url = ready["url"]
        self._port = int(self.url.rsplit(":", 1)[1])  # a restarted server has to be found where it was

    async def _supervise(self) -> None:
        while True:
            assert self._child is not None and self.died is not None
            code = await self._child.ended()
            if self.restarts >= self._rollout.max_restarts:
                self._give_up(f"the rollout server died {self.restarts + 1} times, last with code {code}")
                return
            self.restarts += 1
            self._on_restart(f"the rollout server died (code {code}); starting it again at version {self._weights[0]}")
            await asyncio.sleep(min(5.0, 0.2 * 2 ** (self.restarts - 1)))
            try:
                await self._launch()
            except ServerStartError as exc:
                self._give_up(str(exc))
                return

    def _give_up(self, reason: str) -> None:
        assert self.died is not None
        if not self.died.done():
            tail = "" if "The end of" in reason else f". The end of {self._log_file}:\n{log_tail(self._log_file)}"
            self.died.set_exception(
                ServerStartError(reason + tail, "see the whole log; continue the run with --resume")
            )


def check_port(host: str, port: int) -> None:
    """Fail early when a named port is taken.

    Raises:
        ConfigError: naming the port and the two ways out.
    """
    if port == 0:
        return
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise ConfigError(
                f"rollout.port {port} on {host} cannot be used: {exc.strerror}",
                "stop what listens there, give another rollout.port, or 0 for a free one",
            ) from exc
