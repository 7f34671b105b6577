"""The Ray actor beside each process of a run: it starts it, passes on what it prints, and ends it.

Ray's workers get this class by value. So it imports nothing of this project, and a node needs the
project only in the interpreter that the process runs in.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import Any

MOST_KEPT_BYTES = 2**20
"""Output that is kept until the main process asks for it."""

LONGEST_POLL_S = 5.0
LAST_OUTPUT_S = 1.0
"""Time for the last output after the process has ended: its own children may keep the pipe open."""

NOT_PASSED = ("RAY_", "PYTHON", "SPT_", "VIRTUAL_ENV")
"""Beginnings of variables of Ray's worker that a process must not see: they would choose its
modules."""

# As `agentloop.runtime.child`: the kernel ends the process with this worker. Ray blocks SIGINT in
# its workers; programs that tools start would never see it.
TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Supervisor:
    """One process, seen from its node. An async actor: its thread lives as long as its worker."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._output = bytearray()
        self._lost = 0
        self._news = asyncio.Event()
        self._all_read = asyncio.Event()
        self._ended = asyncio.Event()

    async def place(self) -> dict[str, Any]:
        """Return node, address and GPUs of this actor."""
        import ray

        return {
            "node": ray.get_runtime_context().get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "gpus": [str(number) for number in ray.get_gpu_ids()],
        }

    async def begin(
        self, command: Sequence[str], variables: Mapping[str, str], gpus: Sequence[str], folder: str
    ) -> int | str:
        """Start the process.

        Args:
            command: interpreter and arguments.
            variables: over this node's own.
            gpus: those that it may see.
            folder: its working directory, if that exists here.

        Returns:
            its id, or why it cannot be started.
        """
        python = command[0]
        if not (os.path.isabs(python) and os.access(python, os.X_OK)):  # noqa: PTH117
            return f"the interpreter {python} does not exist on this node"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(NOT_PASSED)}
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus), **variables}
        self._process = subprocess.Popen(  # noqa: ASYNC220  # it returns once the program has begun
            [python, "-I", "-c", TIED, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True, cwd=folder if os.path.isdir(folder) else None,  # noqa: PTH112
        )  # fmt: skip
        # In threads: asyncio takes a process for running as long as its children keep the pipe
        # open.
        loop = asyncio.get_running_loop()
        for work in (self._read, self._wait):
            threading.Thread(target=work, args=(self._process, loop), daemon=True).start()
        return self._process.pid

    def _read(self, process: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop) -> None:
        assert process.stdout is not None
        with process.stdout as pipe, contextlib.suppress(RuntimeError):  # the loop was closed
            while more := os.read(pipe.fileno(), 65536):
                loop.call_soon_threadsafe(self._add, more)
            loop.call_soon_threadsafe(self._all_read.set)

    def _wait(self, process: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop) -> None:
        process.wait()
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._ended.set)

    def _add(self, output: bytes) -> None:
        self._output += output
        if (over := len(self._output) - MOST_KEPT_BYTES) > 0:
            del self._output[:over]
            self._lost += over
        self._news.set()

    async def follow(self) -> tuple[bytes, int | None, bool]:
        """Wait for news of the process.

        Returns:
            what it has printed since the last call, its exit code if it has ended, and whether it
            is stopped by a signal.
        """
        process = self._process
        assert process is not None
        events = [asyncio.ensure_future(event.wait()) for event in (self._ended, self._news)]
        await asyncio.wait(events, timeout=LONGEST_POLL_S, return_when=asyncio.FIRST_COMPLETED)
        for event in events:
            event.cancel()
        code = None
        if self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_read.wait(), LAST_OUTPUT_S)
            code = process.returncode
        self._news.clear()
        output, self._output = bytes(self._output), bytearray()
        if self._lost:
            output, self._lost = b"[%d bytes of output were lost]\n" % self._lost + output, 0
        return output, code, code is None and _state(process.pid) == "T"

    async def signal(self, number: int) -> None:
        """Send a signal to the process and all that it has started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.Signals(number))


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
