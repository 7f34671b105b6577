"""Start child processes, read their logs, and end them.

A child reads nothing from the terminal, runs in its own session (Ctrl-C reaches the run, which ends
its children in order) and is killed by the kernel when its parent dies, however that happens.

`Child` is a server whose output goes to a log: the rollout server and its replicas. `spawn` starts
the others as asyncio processes: the trainer's ranks, isolated tools and rewards, an export.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from agentloop.errors import ServerStartError
from agentloop.runtime import keeper
from agentloop.runtime.early import Process
from agentloop.runtime.variables import child_environment as child_environment

log = logging.getLogger(__name__)

LOG_TAIL_LINES = 20
LOG_TAIL_BYTES = 2**16
POLL_S = 0.01
LOOK_S = 1.0

STOPPED_S = 20.0
"""A process that is stopped (SIGSTOP) for this long is replaced or given up. Nothing else would
notice: its sockets stay open."""

TERMINATE_S = 5.0
KILL_S = 10.0
PR_SET_PDEATHSIG = 1

# Runs in the child, before the program proper replaces it: the death signal survives `execv`. So it
# also works for third-party programs, and from the first moment on.
_TIED_TO_PARENT = f"""
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class StoppedTime:
    """How long a process has been stopped (SIGSTOP).

    One look counts `STOPPED_S / 2` at most, so that a run which is stopped as a whole does not take
    the time for that of its processes.

    Attributes:
        seconds: since the process was last seen running.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def look(self, stopped: bool, elapsed_s: float) -> bool:
        """Note whether the process is stopped now.

        Args:
            elapsed_s: since the last call.

        Returns:
            whether it has been stopped for `STOPPED_S`.
        """
        self.seconds = self.seconds + min(elapsed_s, STOPPED_S / 2) if stopped else 0.0
        return self.seconds >= STOPPED_S


class ChildKilled(ServerStartError):
    """A signal ended the child before it served: a further start may succeed."""


class ChildStopped(ChildKilled):
    """A signal stopped the child before it served, and it was ended."""


async def spawn(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    stdin: int = subprocess.DEVNULL,
    stdout: int | IO[Any],
    stderr: int | IO[Any],
    pass_fds: Sequence[int] = (),
    own_session: bool = True,
    kept: bool = False,
    folder: Path | None = None,
) -> asyncio.subprocess.Process:
    """Start a child process that dies with this one.

    Args:
        command: program and arguments.
        environment: the whole environment.
        stdin, stdout, stderr: as in `subprocess.Popen`.
        pass_fds: file descriptors that the child inherits.
        own_session: keep Ctrl-C away from the child.
        kept: for code that is not ours: a keeper (agentloop/runtime/keeper.py) stands between, and
            ends everything that the command started when the command ends, however it ends. The
            returned process is the keeper: end it with SIGTERM, never with SIGKILL.
        folder: working directory; None: this process's.
    """
    return await asyncio.create_subprocess_exec(
        *(_kept(command) if kept else tied(command)),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=dict(environment),
        pass_fds=pass_fds,
        start_new_session=own_session,
        cwd=folder,
    )


class Child:
    """A server as a child process, ended together with everything that it started.

    Args:
        name: for messages.
        command: program and arguments.
        environment: the whole environment.
        log_file: takes what the child prints; appended to.
        early: the process, if it runs already (agentloop/runtime/early.py).
        log_start: where its output begins in the log; None: at the end of the log as it is now.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log_file: Path,
        *,
        early: Process | None = None,
        log_start: int | None = None,
    ) -> None:
        self.name = name
        self.log_file = log_file
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as log:
            end = log.seek(0, os.SEEK_END)  # earlier processes have written to the same log
            self._log_start = end if log_start is None else log_start
            self._process: Process = early or subprocess.Popen(
                tied(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(environment),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code; None while the child runs."""
        return self._process.poll()

    @property
    def stopped(self) -> bool:
        """Whether the child is stopped by a signal (SIGSTOP)."""
        return is_stopped(self.pid)

    def log_tail(self) -> str:
        """Return the last lines that this child has printed, indented."""
        return log_tail(self.log_file, start=self._log_start)

    async def until_ready(
        self, ready: Callable[[], Awaitable[bool]], timeout_s: float, *, timeout_key: str = "the start time-out"
    ) -> None:
        """Return when `ready` returns True.

        Args:
            timeout_key: the setting of `timeout_s`, for the message.

        Raises:
            ServerStartError: the child ended or took too long; the end of its log is in the
                message.
            ChildKilled: a signal ended it.
            ChildStopped: a signal stopped it for `STOPPED_S` seconds.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        looked, stopped = loop.time(), StoppedTime()

        while not await ready():
            if self.code is not None:
                raise (ChildKilled if self.code < 0 else ServerStartError)(
                    f"{self.name} ended with code {self.code} before it served. The end of {self.log_file}:\n"
                    + self.log_tail(),
                    "the last lines above name the cause",
                )
            if loop.time() > deadline:
                raise ServerStartError(
                    f"{self.name} did not serve within {timeout_s:.0f} s. The end of {self.log_file}:\n"
                    + self.log_tail(),
                    f"raise {timeout_key} if the model is large",
                )
            if (elapsed := loop.time() - looked) >= LOOK_S:  # `ready` may take longer
                looked += elapsed
                if stopped.look(self.stopped, elapsed):
                    await self.kill()
                    raise ChildStopped(
                        f"{self.name} (process {self.pid}) was stopped for {stopped.seconds:.0f} s while it started",
                        "find out what sends SIGSTOP to it",
                    )
            await asyncio.sleep(POLL_S)

    async def ended(self) -> int:
        """Wait until the child ends, and return its exit code."""
        while (code := self._process.poll()) is None:  # noqa: ASYNC110  # a process sets no event
            await asyncio.sleep(POLL_S)
        return code

    async def stop(self) -> None:
        """Ask the child to end, and kill it after `TERMINATE_S` seconds."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TERMINATE_S):
                await self.ended()
        await self.kill()

    async def kill(self) -> None:
        """Kill the child and all that it started.

        A process in an uninterruptible system call, for instance on a network drive that does not
        answer, ends only when that returns: it is left after `KILL_S` seconds, and reported.
        """
        self._signal(signal.SIGKILL)
        try:
            async with asyncio.timeout(KILL_S):
                await self.ended()
        except TimeoutError:
            log.error(
                "%s (pid %d) has not ended %.0f s after SIGKILL: it waits for the kernel, as a rule for a drive",
                self.name, self.pid, KILL_S,
            )  # fmt: skip

    def _signal(self, number: signal.Signals) -> None:
        # Kill the whole group even if its leader has ended: its children may still run.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def tied(command: Sequence[str]) -> list[str]:
    """Wrap a command so that it dies with this process."""
    return [sys.executable, "-I", "-c", _TIED_TO_PARENT, str(os.getpid()), *command]


class PolledProcess:
    """A process of `early`, with the methods of an asyncio process that the trainer uses."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    async def wait(self) -> int:
        while (code := self._process.poll()) is None:  # noqa: ASYNC110  # a process sets no event
            await asyncio.sleep(POLL_S)
        return code

    def kill(self) -> None:
        self._process.kill()


def _kept(command: Sequence[str]) -> list[str]:
    """Wrap a command in a keeper, which dies with this process and takes all descendants along."""
    return [sys.executable, "-I", "-S", str(keeper.__file__), str(os.getpid()), *command]


def die_with_parent() -> None:
    """Ask the kernel (Linux) to kill this process when its parent dies, if `spawn` did not start
    it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped (SIGSTOP): it answers nothing until it is continued."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def log_tail(path: Path, lines: int = LOG_TAIL_LINES, *, start: int = 0) -> str:
    """Return the last lines of a log after its byte `start`, indented."""
    if not path.exists():
        return "    (no log was written)"
    with path.open("rb") as log:
        end = log.seek(0, os.SEEK_END)
        log.seek(max(start, end - LOG_TAIL_BYTES))  # a tool may have printed gigabytes
        last = log.read().decode("utf-8", errors="replace").splitlines()[-lines:]
    return "\n".join(f"    {line}" for line in last) or "    (the log is empty)"


def free_port(host: str = "127.0.0.1") -> int:
    """Return a free port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
