"""Requests to a run that is going on: `agentloop cluster status` and `agentloop cluster scale`.

A run listens at a Unix socket in its directory, which only its user may open. A request is a line
of JSON, `{"command": name, ...}`, and so is the answer: `{"ok": ...}`, or an error as
`agentloop.faults.error_to_json` describes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from agentloop.errors import ConfigError, RequestRejected, RunDirError, ServerError, WorkerError
from agentloop.faults import error_from_json, error_to_json
from agentloop.files import is_file
from agentloop.text import counted
from trainer.locks import is_locked
from trainer.publishing.server_link import Conflict
from trainer.run.processes import Processes
from trainer.run.rundir import LOCK

SOCKET_FILE = "control.sock"
MOST_BYTES = 2**16
"""Longest request."""

READ_S = 30.0
"""Time for a request to arrive."""

ANSWER_S = 120.0
"""Time that the command waits for an answer. A change of the replicas waits for a publish."""

Handler = Callable[[Mapping[str, Any]], Awaitable[Any]]
"""Performs a request, and returns what is sent back as JSON."""


class RunRequests:
    """What a run does for `agentloop cluster`.

    Args:
        processes: of the run.
        progress: returns `step`, `steps` and `version`.
        notice: called with each change, for the console.

    Attributes:
        replicas, workers: the numbers that were asked for last; None: those of the recipe.
    """

    def __init__(
        self, processes: Processes, progress: Callable[[], dict[str, int]], notice: Callable[[str], None]
    ) -> None:
        self._processes = processes
        self._progress = progress
        self._notice = notice
        self.replicas: int | None = None
        self.workers: int | None = None

    @property
    def handlers(self) -> dict[str, Handler]:
        """By name of the command."""
        return {"status": self.status, "scale": self.scale}

    async def status(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """Return the progress of the run, and the state of its replicas and agent workers."""
        workers = self._processes.agent_workers
        rows = [{**state, "part": f"agent worker {state['number']}"} for state in (workers.states() if workers else ())]
        try:
            facts = await self._processes.link.facts()
        except ServerError as exc:
            return {**self._progress(), "pid": os.getpid(), "processes": [_away(str(exc)), *rows]}
        replicas = [
            {
                "part": f"replica {state['name']}",
                "state": ": ".join(filter(None, (state["state"], state["reason"]))),
                "version": state["weight_version"],
                "in_flight": state["in_flight"],
            }
            for state in facts.get("states", ())
        ]
        return {**self._progress(), "pid": os.getpid(), "processes": [*replicas, *rows]}

    async def scale(self, request: Mapping[str, Any]) -> list[str]:
        """Change the number of replicas (`rollout`) and of agent workers (`agents`).

        Returns:
            a line for each change.

        Raises:
            ConfigError: the run was started in a way that does not allow it.
        """
        workers = self._processes.agent_workers
        if "agents" in request and workers is None:
            raise ConfigError(
                "episodes run in the main process of this run", "start it with cluster.agents.workers=1 or more"
            )
        lines = []
        if "rollout" in request:
            count = int(request["rollout"])
            try:
                await self._processes.link.post("/scale_replicas", {"replicas": count})
            except (Conflict, RequestRejected) as exc:
                raise ConfigError(f"the replicas cannot be changed: {exc}", "start with rollout.replicas=2") from exc
            self.replicas = count
            if self._processes.server is not None:
                self._processes.server.replicas = count
            lines.append(
                f"rollout: {counted(count, 'replica')}; new ones take requests when they have loaded the weights"
            )
        if "agents" in request and workers is not None:
            count = int(request["agents"])
            await workers.scale(count)
            self.workers = count
            lines.append(f"agents: {counted(count, 'worker')}; those that leave end their episodes first")
        for line in lines:
            self._notice(f"agentloop cluster scale: {line}")
        return lines


def _away(reason: str) -> dict[str, Any]:
    return {"part": "rollout server", "state": f"does not answer: {reason}"}


@contextlib.asynccontextmanager
async def listening(run_dir: Path, handlers: Mapping[str, Handler], warn: Callable[[str], None]) -> AsyncIterator[None]:
    """Answer requests within the block.

    Args:
        handlers: by name of the command.
        warn: called if the file system has no sockets; the run goes on without.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # ValueError: the line is too long. A request that has begun is finished, read or not.
        with contextlib.suppress(ConnectionError, TimeoutError, ValueError), contextlib.closing(writer):
            async with asyncio.timeout(READ_S):
                line = await reader.readline()
            writer.write(orjson.dumps(await _answer_to(line, handlers)) + b"\n")
            await writer.drain()

    server = None
    try:
        with _short(run_dir) as path:
            path.unlink(missing_ok=True)
            sock = socket.socket(socket.AF_UNIX)
            before = os.umask(0o177)
            try:
                sock.bind(str(path))
            finally:
                os.umask(before)
            server = await asyncio.start_unix_server(answer, sock=sock, limit=MOST_BYTES)
    except OSError as exc:
        warn(f"agentloop cluster cannot reach this run: no socket can be made in {run_dir} ({exc.strerror})")
    try:
        yield
    finally:
        if server is not None:
            server.close()
            (run_dir / SOCKET_FILE).unlink(missing_ok=True)


async def _answer_to(line: bytes, handlers: Mapping[str, Handler]) -> dict[str, Any]:
    try:
        request = orjson.loads(line)
        handler = handlers[request["command"]]
    except (ValueError, KeyError, TypeError):
        return error_to_json(WorkerError("the run does not know this request", "use the agentloop of the run"))
    try:
        return {"ok": await handler(request)}
    except Exception as exc:  # noqa: BLE001  # whoever asked must learn of every failure
        return error_to_json(exc)


def ask(run_dir: Path, command: str, **arguments: Any) -> Any:
    """Send a request to the run in a directory, and return its answer.

    Raises:
        RunDirError: no run is going on there.
        WorkerError: it did not answer, or failed.
        AgentloopError: it refused; the error is the run's own.
    """
    try:
        with _short(run_dir) as path, socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(ANSWER_S)
            sock.connect(str(path))
            sock.sendall(orjson.dumps({"command": command, **arguments}) + b"\n")
            with sock.makefile("rb") as answers:
                answer = orjson.loads(answers.readline())
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        if is_file(run_dir / LOCK) and is_locked(run_dir / LOCK):
            raise RunDirError(f"the run in {run_dir} is starting or ending", "ask again in some seconds") from None
        raise RunDirError(
            f"no run is going on in {run_dir}", "give the run directory of one, such as outputs/quickstart"
        ) from None
    except PermissionError:
        raise RunDirError(f"the run in {run_dir} is another user's", "ask as the user who started it") from None
    except (OSError, ValueError) as exc:
        raise WorkerError(
            f"the run in {run_dir} did not answer: {exc}",
            "see whether it is stopped or busy; `agentloop cluster status` shows what has changed",
        ) from exc
    if "ok" in answer:
        return answer["ok"]
    raise error_from_json(answer, lambda message: WorkerError(f"the run in {run_dir} failed: {message}"))


@contextlib.contextmanager
def _short(run_dir: Path) -> Iterator[Path]:
    """Yield the path of the socket in a short form: it may have 107 characters at most."""
    folder = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        direct, linux = run_dir / SOCKET_FILE, Path(f"/proc/self/fd/{folder}")
        yield linux / SOCKET_FILE if linux.exists() else direct
    finally:
        os.close(folder)
