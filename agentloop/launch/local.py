"""Child processes of this one. They are tied to it: the kernel ends them with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from pathlib import Path

from agentloop.launch.base import Launched, Program
from agentloop.runtime.child import Child, PolledProcess, is_stopped, log_tail, spawn
from agentloop.runtime.early import begin_early


class LocalLauncher:
    """Starts child processes, early ones if there are (agentloop/runtime/early.py)."""

    local = True
    one_machine = True
    host: str | None = None

    async def start(self, program: Program) -> Launched:
        """Start a child at the other end of a socket pair."""
        log, environment = program.log, program.environment
        log_start = log.stat().st_size if log.exists() else 0
        begun = await begin_early(program.module, [*program.arguments, "--fd", "{fd}"], environment, log)
        if begun is not None and begun[1] is not None:
            return LocalProcess(PolledProcess(begun[0]), begun[1], log, log_start)

        ours, theirs = socket.socketpair()
        with theirs, log.open("ab") as output:
            process = await spawn(
                [sys.executable, "-P", "-m", program.module, *program.arguments, "--fd", str(theirs.fileno())],
                environment=environment,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
            )
        return LocalProcess(process, ours, log, log_start)

    async def start_server(self, title: str, program: Program) -> Child:
        """Start a child that watches this process."""
        log, environment = program.log, program.environment
        arguments = [*program.arguments, "--parent-pid", str(os.getpid())]
        log_start = log.stat().st_size if log.exists() else 0
        begun = await begin_early(program.module, arguments, environment, log)
        if begun is not None:
            return Child(title, [], environment, log, early=begun[0], log_start=log_start)
        return Child(title, [sys.executable, "-P", "-m", program.module, *arguments], environment, log)


class LocalProcess:
    """A child process and our end of its socket pair."""

    def __init__(
        self, process: asyncio.subprocess.Process | PolledProcess, sock: socket.socket, log: Path, log_start: int
    ) -> None:
        self.sock = sock
        self._process = process
        self._log = log
        self._log_start = log_start

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stopped(self) -> bool:
        return is_stopped(self.pid)

    async def wait(self) -> int:
        return await self._process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def log_tail(self) -> str:
        return log_tail(self._log, start=self._log_start)
