"""An engine as a child process: started, waited for, ended with everything that it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from agentloop.errors import ServerStartError

LOG_TAIL_LINES = 20
POLL_S = 0.05
TERMINATE_S = 5.0

# Runs in the child before it becomes the engine: the kernel ends it when this process dies, however that happens.
_TIED_TO_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class Child:
    """One process in a process group of its own.

    Args:
        name: for messages.
        command: interpreter and arguments.
        environment: the whole environment.
        log_file: takes what it prints.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log_file: Path) -> None:
        self.name = name
        self.log_file = log_file
        log_file.parent.mkdir(parents=True, exist_ok=True)
        tied = [sys.executable, "-I", "-c", _TIED_TO_PARENT, str(os.getpid()), *command]
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(
                tied, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(environment), start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self._process.poll()

    async def until_ready(self, ready: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
        """Return when `ready` says so.

        Raises:
            ServerStartError: it ended or took too long; the end of its log is in the message.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not await ready():
            if self.code is not None:
                raise ServerStartError(
                    f"{self.name} ended with code {self.code} before it served. The end of {self.log_file}:\n"
                    + log_tail(self.log_file),
                    "the last lines above name the cause",
                )
            if loop.time() > deadline:
                raise ServerStartError(
                    f"{self.name} did not serve within {timeout_s:.0f} s. The end of {self.log_file}:\n"
                    + log_tail(self.log_file),
                    "raise the start time-out if the model is large",
                )
            await asyncio.sleep(POLL_S)

    async def ended(self) -> int:
        """Wait for its end; returns the exit code."""
        while (code := self._process.poll()) is None:  # noqa: ASYNC110  # a process sets no event
            await asyncio.sleep(POLL_S)
        return code

    async def stop(self) -> None:
        """Ask it to end, then make it."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TERMINATE_S):
                await self.ended()
        await self.kill()

    async def kill(self) -> None:
        """End the whole group at once."""
        self._signal(signal.SIGKILL)
        await self.ended()

    def _signal(self, number: signal.Signals) -> None:
        # Also when the leader is gone: what it started may live on.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def log_tail(path: Path, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a log, indented."""
    if not path.exists():
        return "    (no log was written)"
    return "\n".join("    " + line for line in path.read_text(errors="replace").splitlines()[-lines:])


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


ALLOCATOR = ":".join(
    f"glibc.malloc.{setting}" for setting in ("hugetlb=1", f"mmap_threshold={2**25}", f"trim_threshold={2**30}")
)
"""glibc keeps what is freed and uses huge pages: else 8% of a step would go into tens of thousands of page faults."""


def child_environment(threads: int) -> dict[str, str]:
    """This process's environment, with `threads` intra-op threads: read by torch when it is imported."""
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(threads)
    environment.setdefault("GLIBC_TUNABLES", ALLOCATOR)
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    return environment
