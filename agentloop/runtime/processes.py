"""Run functions in child processes, where a call can always be killed.

A process may crash, run out of memory or set signal handlers (`signal.alarm`) without harm to the
run, and it takes everything along that it started (`keeper`). One that dies while it is idle or
starts, for instance because the kernel needed memory, is replaced without a word. Arguments and
results are sent as JSON, never as pickles, because they contain model output.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from agentloop.client.time_limit import not_counted, place_in
from agentloop.errors import CallFailed
from agentloop.runtime.child import child_environment, spawn
from agentloop.runtime.process_worker import SIZE_BYTES, TAKEN
from agentloop.trace.spans import current_traceparent

STDERR_LINES = 20
START_TIMEOUT_S = 60.0

MOST_STARTS = 3
"""Of processes for one call, if each dies before the call has begun."""


class ProcessWorkers:
    """Run a function in its own processes, one call at a time in each.

    Args:
        reference: the function: `path.py:name`, `module.name`, or an entry point of `group`.
        folder: base of a relative `path.py`.
        group: entry-point group.
        form: JSON form of arguments and results, `tool` or `reward`
            (agentloop/runtime/process_worker.py).
        workers: maximum number of processes.
        memory_mb: limit of a process's address space; None: no limit.
        name: name of the function, for messages.
    """

    def __init__(
        self,
        reference: str,
        folder: Path,
        group: str,
        *,
        form: Literal["tool", "reward"],
        workers: int,
        memory_mb: int | None,
        name: str,
    ) -> None:
        self._hello = {
            "reference": reference,
            "folder": str(folder),
            "group": group,
            "form": form,
            "memory_mb": memory_mb,
            "path": [entry for entry in sys.path if entry],
        }
        self._name = name
        self._slots = asyncio.Semaphore(workers)
        self._idle: list[_Process] = []
        self._all: set[_Process] = set()

    async def __call__(self, payload: Mapping[str, Any]) -> Any:
        """Call the function with `payload`. If the call is cancelled, its process is killed.

        Raises:
            CallFailed: the function raised, its result is not JSON, or its process died.
        """
        try:
            text = json.dumps({**payload, "traceparent": current_traceparent()}, default=_plain).encode()
        except (TypeError, ValueError) as exc:
            raise CallFailed(f"{type(exc).__name__}: the arguments of {self._name} are not JSON: {exc}") from exc

        async with place_in(self._slots):
            answer = await self._ask_idle(text) or await self._ask_new(text)

        if "error" in answer:
            raise CallFailed(str(answer["error"]), frames=answer.get("frames", ()))
        return answer["value"]

    def close(self) -> None:
        """Kill every process."""
        for process in list(self._all):
            self._drop(process)
        self._idle.clear()

    async def _ask_idle(self, text: bytes) -> dict[str, Any] | None:
        """Ask an idle process; None: there is none, or none that lived until the call began."""
        while self._idle:
            process = self._idle.pop()
            if not process.runs:
                self._drop(process)
                continue
            try:
                return await self._ask(process, text)
            except _NotBegun:  # it has died, and this process has not been told yet
                continue
        return None

    async def _ask_new(self, text: bytes) -> dict[str, Any]:
        """Ask a process that is started for it, or another one if that dies before the call."""
        for _ in range(MOST_STARTS - 1):
            with contextlib.suppress(_NotBegun):
                return await self._ask_started(text)
        return await self._ask_started(text)

    async def _ask_started(self, text: bytes) -> dict[str, Any]:
        with not_counted():  # a start has a time limit of its own
            process = await self._start()
        return await self._ask(process, text)

    async def _ask(self, process: _Process, text: bytes) -> dict[str, Any]:
        """Ask a process and keep it for the next call, or end it if it does not answer."""
        try:
            answer = await process.ask(text)
        except BaseException:
            self._drop(process)
            raise
        self._idle.append(process)
        return answer

    async def _start(self) -> _Process:
        process = _Process(self._name)
        self._all.add(process)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await process.start()
                answer = await process.ask(json.dumps(self._hello).encode())
        except CallFailed as exc:  # it died, so the call that it was started for had no effect
            self._drop(process)
            raise _NotBegun(exc.message) from exc
        except BaseException:
            self._drop(process)
            raise
        if "error" in answer:
            self._drop(process)
            raise CallFailed(str(answer["error"]), frames=answer.get("frames", ()))
        return process

    def _drop(self, process: _Process) -> None:
        self._all.discard(process)
        process.kill()


class _NotBegun(CallFailed):
    """The process died before it took the message, so the call had no effect."""


class _Process:
    """One process, its keeper, and its pipes."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._process: asyncio.subprocess.Process | None = None
        self._said: collections.deque[str] = collections.deque(maxlen=STDERR_LINES)
        self._listener: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._process = await spawn(
            [sys.executable, "-m", "agentloop.runtime.process_worker"],
            environment=child_environment(1, allocator=False),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            kept=True,
        )
        self._listener = asyncio.create_task(self._listen(), name=f"stderr of {self._name}")

    @property
    def runs(self) -> bool:
        """Whether the process runs, as far as the event loop knows."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        return process.returncode is None and not process.stdin.is_closing() and not process.stdout.at_eof()

    async def ask(self, message: bytes) -> dict[str, Any]:
        """Send a message and return the answer.

        Raises:
            CallFailed: the process died before it answered; `_NotBegun` if it had not taken the
                message.
        """
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        taken = False
        try:
            process.stdin.write(len(message).to_bytes(SIZE_BYTES) + message)
            await process.stdin.drain()
            taken = await process.stdout.readexactly(SIZE_BYTES) == TAKEN
            size = int.from_bytes(await process.stdout.readexactly(SIZE_BYTES))
            answer: dict[str, Any] = json.loads(await process.stdout.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError, RuntimeError) as exc:
            # uvloop raises a RuntimeError where asyncio has a ConnectionError: the pipe is closed.
            raise (CallFailed if taken else _NotBegun)(await self._exit_report()) from exc
        except ValueError as exc:
            raise CallFailed(f"the process of {self._name} wrote something other than its answer to its pipe") from exc
        return answer

    def kill(self) -> None:
        """Kill the process and everything it started; its keeper does, even after this process."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            for number in (signal.SIGTERM, signal.SIGCONT):  # the function may have stopped its keeper
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process.pid, number)
        with contextlib.suppress(RuntimeError):  # the event loop is closed, and the pipes with it
            if self._listener is not None:
                self._listener.cancel()
            if process.stdin is not None:
                process.stdin.close()

    async def _exit_report(self) -> str:
        assert self._process is not None
        code = await self._process.wait()
        if self._listener is not None:
            await asyncio.wait([self._listener], timeout=1.0)

        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        tail = "\n".join(self._said).strip()
        return f"the process of {self._name} {how}" + (f"; its last output: {tail}" if tail else "")

    async def _listen(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        while chunk := await self._process.stderr.read(65536):
            self._said.extend(chunk.decode("utf-8", "replace").splitlines())


def _plain(value: Any) -> Any:
    """Convert values of rows and trajectories that JSON does not know."""
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if hasattr(value, "item"):  # a numpy number
        return value.item()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not JSON")
