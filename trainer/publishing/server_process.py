"""The rollout server as a child process: started, supervised, restarted at the current version.

The server is started by name: nothing of `rollout_server` is imported here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from agentloop.config import ModelConfig, RolloutConfig
from agentloop.config.server import ServerSettings
from agentloop.errors import ConfigError, ServerStartError
from agentloop.launch.base import Launcher, Program
from agentloop.launch.local import LocalLauncher
from agentloop.runtime.child import Child, ChildKilled, ChildStopped, StoppedTime, child_environment
from agentloop.runtime.early import EarlyProgram

TOKEN_VARIABLE = "AGENTLOOP_SERVER_TOKEN"  # noqa: S105  # the name of a variable, not a token
ADMIN_TOKEN_VARIABLE = "AGENTLOOP_SERVER_ADMIN_TOKEN"  # noqa: S105  # as above

MODULE = "rollout_server"

REPLICAS_SHARE = 0.9
"""Share of `rollout.start_timeout_s` that the replicas may take: the server reports their failure
before the run gives up on the server."""

MOST_CONNECTIONS: int = ServerSettings.model_fields["max_connections"].default
FURTHER_CONNECTIONS = 256
"""Connections beside those of the run's episodes: the trainer's, and those of people."""

LONGEST_BACKOFF_S = 5.0
FIRST_BACKOFF_S = 0.2
WATCH_S = 1.0


class ServerProcess:
    """One rollout server under supervision.

    Args:
        connections: that the run's episodes may open.
        launcher: starts the process; None: as a child of this one.

    Attributes:
        token: bearer token of the server: the recipe's, else a random one for this process, so that
            no web page and no other user of this machine can change the server. It is in the
            environment of the server and nowhere else.
        replicas: of the next start.
        restarts: how often it was restarted after it died.
        died: fails with the reason when the server cannot be restarted; None before `start`.
        url: base URL of the running server.
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
        connections: int = 0,
        launcher: Launcher | None = None,
    ) -> None:
        self._model_path = model_path
        self._model = model
        self._rollout = rollout
        self._seed = seed
        self._log_file = log_file
        self._weights_roots = tuple(weights_roots)
        self._on_restart = on_restart
        self._connections = connections
        self._launcher = launcher or LocalLauncher()

        self._ready_file = log_file.with_name("server.ready.json")
        self._settings_file = log_file.with_name("server.settings.json")
        self._port = rollout.port
        self._child: Child | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._weights: tuple[int, Path | None] = (0, None)

        self.token: str = rollout.token or secrets.token_urlsafe(32)
        self.replicas = rollout.replicas
        self.restarts = 0
        self.died: asyncio.Future[None] | None = None
        self.url = ""

    async def start(self, version: int, weights: Path | None) -> str:
        """Start the server and wait until it serves `version`; return its URL.

        Args:
            version: policy version of the weights.
            weights: published folder to serve; None: the model's own.

        Raises:
            ServerStartError: it died or did not answer in time; the last lines of its log are in
                the message.
        """
        self._weights = (version, weights)
        self.died = asyncio.get_running_loop().create_future()
        try:
            await self._launch()
        except ChildKilled:
            await self._launch_again("while it started")
        self._supervisor = asyncio.create_task(self._supervise(), name="supervisor of the rollout server")
        return self.url

    def serves(self, version: int, weights: Path) -> None:
        """Set the weights that a restarted server starts from."""
        self._weights = (version, weights)

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

    async def stop(self) -> None:
        """Terminate the server, and kill it if it does not end in time."""
        if self._supervisor:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        if self._child is not None and self._child.code is None:
            await self._child.stop()

    async def _launch(self) -> None:
        rollout = self._rollout
        self._ready_file.unlink(missing_ok=True)
        file = self.settings.save(self._settings_file)

        # Pass secrets in the environment: the settings file stays in the run's folder.
        named = {TOKEN_VARIABLE: self.token, ADMIN_TOKEN_VARIABLE: rollout.admin_token}
        tokens = {variable: token for variable, token in named.items() if token}
        program = Program(
            name="rollout_server",
            role="server",
            number=0,
            module=MODULE,
            # What ties it to this process is not in the file, with which it can be started by hand.
            arguments=["--settings", str(file.absolute())],
            environment=child_environment(rollout.threads) | tokens,
            variables=child_environment(rollout.threads, base={}) | tokens,
            log=self._log_file,
        )
        self._child = await self._launcher.start_server("the rollout server", program)
        try:
            await self._child.until_ready(
                self._is_ready, rollout.start_timeout_s, timeout_key="rollout.start_timeout_s"
            )
        except ServerStartError:
            await self._child.stop()
            raise

        self.url = json.loads(self._ready_file.read_text())["url"]
        self._port = int(self.url.rsplit(":", 1)[1])  # a restarted server must be found at the same URL

    @property
    def settings(self) -> ServerSettings:
        """The settings for the next start of the server."""
        version, weights = self._weights
        rollout = self._rollout
        return ServerSettings(
            **{
                **rollout.engine_options(),
                "replicas": self.replicas,
                "max_connections": max(MOST_CONNECTIONS, self._connections + FURTHER_CONNECTIONS),
                "host": self._launcher.host or rollout.host,
                "model": self._model_path,
                "dtype": self._model.dtype,
                "trust_remote_code": self._model.trust_remote_code,
                "port": self._port,
                "seed": self._seed,
                "deterministic": rollout.determinism(self._model.dtype),
                "memory_saver": rollout.colocated,
                "in_place_updates": rollout.publish.running == "in_place",
                "weights_roots": self._weights_roots,
                "weight_version": str(version),
                "weights": weights,
                "start_timeout_s": REPLICAS_SHARE * rollout.start_timeout_s,
                "token_env": TOKEN_VARIABLE,
                "admin_token_env": ADMIN_TOKEN_VARIABLE if rollout.admin_token else None,
                "ready_file": self._ready_file,
                "log_dir": self._log_file.parent,
            }
        )

    async def _is_ready(self) -> bool:
        return self._ready_file.exists()

    async def _launch_again(self, reason: str) -> None:
        """Start the server after it died for `reason`; again if it is killed while it starts.

        Raises:
            ServerStartError: it died more than `rollout.max_restarts` times.
        """
        while True:
            if self.restarts >= self._rollout.max_restarts:
                raise ServerStartError(
                    f"the rollout server died {self.restarts + 1} times, last {reason}. The end of {self._log_file}:\n"
                    + self._log_tail(),
                    "read the whole log; resume the run with --resume",
                )
            self.restarts += 1
            self._on_restart(f"the rollout server died ({reason}); restarting it at version {self._weights[0]}")
            await asyncio.sleep(min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (self.restarts - 1)))
            try:
                await self._launch()
                return
            except ChildStopped as exc:
                self._on_restart(exc.message)
                reason = "while it started"
            except ChildKilled:
                reason = "while it started"

    async def _end_of(self, child: Child) -> int:
        """Wait until the server ends, and return its exit code. Kill it if it stays stopped."""
        ended = asyncio.ensure_future(child.ended())
        stopped = StoppedTime()
        try:
            while not (await asyncio.wait([ended], timeout=WATCH_S))[0]:
                if stopped.look(child.stopped, WATCH_S):
                    seconds = stopped.seconds
                    self._on_restart(f"the rollout server (process {child.pid}) was stopped for {seconds:.0f} s")
                    await child.kill()
            return await ended
        finally:
            ended.cancel()

    def _log_tail(self) -> str:
        return "" if self._child is None else self._child.log_tail()

    async def _supervise(self) -> None:
        assert self.died is not None
        while True:
            assert self._child is not None
            code = await self._end_of(self._child)
            try:
                await self._launch_again(f"with code {code}")
            except ServerStartError as exc:
                if not self.died.done():
                    self.died.set_exception(exc)
                return


def early_server(rollout: RolloutConfig) -> EarlyProgram:
    """Return the program of a rollout server, to be started early."""
    imports, environment = ["rollout_server.launch"], child_environment(rollout.threads)
    if rollout.engine != "torch" or rollout.replicas != 1:  # the model is in other processes
        return EarlyProgram(MODULE, imports, environment, heavy=False)
    imports.append("rollout_server.engines.torch_engine.create")
    return EarlyProgram(MODULE, imports, environment, forks=rollout.device == "cpu")


def check_port(host: str, port: int) -> None:
    """Fail early if the configured port is taken.

    Raises:
        ConfigError: names the port and two ways to fix it.
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
                "stop the process that uses it, or set rollout.port to another port (0: any free one)",
            ) from exc
