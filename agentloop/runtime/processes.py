"""Where blocking functions run: on the event loop, in threads, or in processes that can be killed.

One event loop carries every episode, so nothing may hold it up. A thread keeps it free, but a thread cannot be stopped:
a call that hangs in one is left behind. A process can be killed, whatever hangs, and may crash, use up its memory or
set signal handlers (`signal.alarm`) without harm to the run.

Arguments and results cross to a process as JSON, never as pickles: what a model wrote is among them.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from agentloop.errors import AgentloopError
from agentloop.runtime.child import child_environment, spawn

RunIn = Literal["inline", "thread", "process"]
DEFAULT_WORKERS = {"thread": 8, "process": 2}
"""Calls at once. Threads that compute keep Python's lock for 5 ms each before the event loop gets it again."""

MOST_ABANDONED = 64
"""Threads that hang, in all, before a function is given up."""

STDERR_LINES = 20
SIZE_BYTES = 4
START_TIMEOUT_S = 60.0


class CallFailed(AgentloopError):
    """A call in a process failed. The message is `Type: text` of what it raised, or how the process died."""


class FunctionHangs(AgentloopError):
    """So many calls of a function hang in threads that no more are begun."""


def describe(exc: BaseException) -> str:
    """An exception in words for a model or a log: `Type: text`, as it was where it was raised."""
    return exc.message if isinstance(exc, CallFailed) else f"{type(exc).__name__}: {exc}"


# -- threads -------------------------------------------------------------------------------------------------------


class ThreadWorkers:
    """Runs a function in daemon threads of its own, so that one that hangs holds up no other function and no exit.

    Args:
        function: may block.
        workers: calls at once; others wait.
        name: of the function, for messages and threads.
    """

    def __init__(self, function: Callable[..., Any], *, workers: int, name: str) -> None:
        self._function = function
        self._name = name
        self._slots = asyncio.Semaphore(workers)
        self._idle: list[_Thread] = []
        self._abandoned = 0

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function; what it raises is raised here.

        Cancelled, the call is left behind: its thread ends when it returns.

        Raises:
            FunctionHangs: too many calls were left behind and never returned.
        """
        async with self._slots:
            if self._abandoned >= MOST_ABANDONED:
                raise FunctionHangs(
                    f"{self._abandoned} calls of {self._name} hang in threads, which nothing can stop",
                    "run it in a process: `run_in: process`",
                )
            thread = self._idle.pop() if self._idle else _Thread(self._name)
            call = partial(contextvars.copy_context().run, partial(self._function, *args, **kwargs))
            future = thread.submit(call, asyncio.get_running_loop())
            try:
                result = await future
            except asyncio.CancelledError:
                self._abandoned += 1
                thread.abandon(self._come_back)
                raise
            except BaseException:
                self._idle.append(thread)
                raise
            self._idle.append(thread)
            return result

    def close(self) -> None:
        """End the threads that wait; those that hang are daemons and end with the process."""
        for thread in self._idle:
            thread.stop()
        self._idle.clear()

    def _come_back(self) -> None:
        self._abandoned -= 1


class _Thread:
    """One daemon thread that runs one call after the other."""

    def __init__(self, name: str) -> None:
        self._inbox: SimpleQueue[tuple[Callable[[], Any], asyncio.AbstractEventLoop, asyncio.Future[Any]] | None] = (
            SimpleQueue()
        )
        self._lock = threading.Lock()
        self._left_behind: Callable[[], None] | None = None
        self._busy = False
        threading.Thread(target=self._work, name=f"agentloop {name}", daemon=True).start()

    def submit(self, call: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> asyncio.Future[Any]:
        future = loop.create_future()
        self._busy = True
        self._inbox.put((call, loop, future))
        return future

    def abandon(self, when_back: Callable[[], None]) -> None:
        """Nobody waits for the call any more; `when_back` is called on the event loop when it returns, if it does."""
        with self._lock:
            if self._busy:
                self._left_behind = when_back
                return
        when_back()
        self.stop()

    def stop(self) -> None:
        self._inbox.put(None)

    def _work(self) -> None:
        while (job := self._inbox.get()) is not None:
            call, loop, future = job
            result: Any = None
            error: BaseException | None = None
            try:
                result = call()
            except BaseException as exc:  # noqa: BLE001  # SystemExit too: it would end this thread in silence
                error = exc if isinstance(exc, Exception) else RuntimeError(f"{type(exc).__name__}: {exc}")
            with self._lock:
                self._busy = False
                left_behind = self._left_behind
            with contextlib.suppress(RuntimeError):  # the event loop was closed meanwhile
                if left_behind is not None:
                    loop.call_soon_threadsafe(left_behind)
                else:
                    loop.call_soon_threadsafe(_settle, future, result, error)
            if left_behind is not None:
                return
            del call, job, result, error


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, StopIteration):  # which a future does not take
        future.set_exception(RuntimeError(f"StopIteration: {error}"))
    else:
        future.set_exception(error)


# -- processes -----------------------------------------------------------------------------------------------------


class ProcessWorkers:
    """Runs a function in processes of its own, one call at a time in each.

    Args:
        reference: names the function: `path.py:name`, `module.name`, or an entry point of `group`.
        folder: a file is relative to it.
        group: entry-point group.
        form: how arguments and results are written as JSON: `tool` or `reward` (agentloop/runtime/process_worker.py).
        workers: processes at most, each with one call.
        memory_mb: address space of a process; None: no limit.
        name: of the function, for messages.
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
        """Call the function with what `payload` says. Cancelled, its process is killed.

        Raises:
            CallFailed: it raised, its result is no JSON, or its process died.
        """
        try:
            text = json.dumps(payload, default=_plain).encode()
        except (TypeError, ValueError) as exc:
            raise CallFailed(f"{type(exc).__name__}: the arguments of {self._name} are no JSON: {exc}") from exc
        async with self._slots:
            process = self._idle.pop() if self._idle else await self._start()
            try:
                answer = await process.ask(text)
            except BaseException:
                self._drop(process)
                raise
            self._idle.append(process)
        if "error" in answer:
            raise CallFailed(str(answer["error"]))
        return answer["value"]

    def close(self) -> None:
        """Kill every process."""
        for process in list(self._all):
            self._drop(process)
        self._idle.clear()

    async def _start(self) -> _Process:
        process = _Process(self._name)
        self._all.add(process)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await process.start()
                answer = await process.ask(json.dumps(self._hello).encode())
            if "error" in answer:
                raise CallFailed(str(answer["error"]))
        except BaseException:
            self._drop(process)
            raise
        return process

    def _drop(self, process: _Process) -> None:
        self._all.discard(process)
        process.kill()


class _Process:
    """One process and the pipes to it. Messages are JSON behind their length."""

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
        )
        self._listener = asyncio.create_task(self._listen(), name=f"stderr of {self._name}")

    async def ask(self, message: bytes) -> dict[str, Any]:
        """Send a message and wait for the answer.

        Raises:
            CallFailed: the process died before it answered.
        """
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(len(message).to_bytes(SIZE_BYTES) + message)
            await process.stdin.drain()
            size = int.from_bytes(await process.stdout.readexactly(SIZE_BYTES))
            answer: dict[str, Any] = json.loads(await process.stdout.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError) as exc:
            raise CallFailed(await self._obituary()) from exc
        return answer

    def kill(self) -> None:
        """End it and all that it started, at once."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(RuntimeError):  # the event loop is closed, and its pipes with it
            if self._listener is not None:
                self._listener.cancel()
            if process.stdin is not None:
                process.stdin.close()

    async def _obituary(self) -> str:
        assert self._process is not None
        code = await self._process.wait()
        if self._listener is not None:
            await asyncio.wait([self._listener], timeout=1.0)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        tail = "\n".join(self._said).strip()
        return f"the process of {self._name} {how}" + (f"; its last words: {tail}" if tail else "")

    async def _listen(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        while chunk := await self._process.stderr.read(65536):
            self._said.extend(chunk.decode("utf-8", "replace").splitlines())


def _plain(value: Any) -> Any:
    """What JSON does not know, of what rows and trajectories hold."""
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if hasattr(value, "item"):  # a number of numpy
        return value.item()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not JSON")


# -- what tools and rewards use ------------------------------------------------------------------------------------

Caller = Callable[..., Awaitable[Any]]


def isolate(
    function: Callable[..., Any], run_in: RunIn, *, workers: int | None, name: str, process: Callable[[int], Caller]
) -> Caller:
    """An async function that runs `function` where `run_in` says.

    Args:
        function: plain or async; an async one runs on the event loop, unless in a process.
        workers: calls at once; None: `DEFAULT_WORKERS`.
        process: makes the caller for processes, given the number of workers.
    """
    if run_in == "process":
        return process(workers or DEFAULT_WORKERS["process"])
    if inspect.iscoroutinefunction(function):
        return function
    if run_in == "inline":

        async def inline(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return inline
    return ThreadWorkers(function, workers=workers or DEFAULT_WORKERS["thread"], name=name)


def close(caller: Any) -> None:
    """End what `isolate` started."""
    if isinstance(caller, ThreadWorkers | ProcessWorkers):
        caller.close()
