"""Run blocking functions in threads. A hanging call is abandoned: a thread cannot be stopped."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any

from agentloop.client.time_limit import place_in
from agentloop.errors import FunctionHangs

MOST_ABANDONED = 64
"""Hanging calls of one function after which no further call is started."""


class ThreadWorkers:
    """Runs a function in daemon threads: a hanging call delays neither other calls nor the exit.

    Args:
        function: may block.
        workers: concurrent calls; further ones wait.
        name: name of the function, for messages and threads.
    """

    def __init__(self, function: Callable[..., Any], *, workers: int, name: str) -> None:
        self._function = function
        self._name = name
        self._slots = asyncio.Semaphore(workers)
        self._idle: list[_Thread] = []
        self._abandoned = 0

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function and return its result, or raise what it raises.

        A cancelled call is abandoned: its thread ends when the function returns.

        Raises:
            FunctionHangs: too many abandoned calls have not returned.
        """
        async with place_in(self._slots):
            if self._abandoned >= MOST_ABANDONED:
                raise FunctionHangs(
                    f"{self._abandoned} calls of {self._name} hang in threads, which cannot be killed",
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
        """End the idle threads. Hanging ones are daemons and end with the process."""
        for thread in self._idle:
            thread.stop()
        self._idle.clear()

    def _come_back(self) -> None:
        self._abandoned -= 1


class _Thread:
    """One daemon thread that runs one call at a time."""

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
        """Give up the present call; if it ever returns, `when_back` runs on the event loop."""
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
            except BaseException as exc:  # noqa: BLE001  # SystemExit would end this thread silently
                error = exc if isinstance(exc, Exception) else RuntimeError(f"{type(exc).__name__}: {exc}")
                error = error.with_traceback(exc.__traceback__)  # the user's line

            # Under the lock: `abandon` either sees that the call has returned, or is seen here.
            with self._lock:
                self._busy = False
                left_behind = self._left_behind
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                if left_behind is not None:
                    loop.call_soon_threadsafe(left_behind)
                else:
                    loop.call_soon_threadsafe(_settle, future, result, error)
            if left_behind is not None:
                return
            del call, job, result, error  # an idle thread must not keep arguments alive


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, StopIteration):  # a future refuses it
        future.set_exception(RuntimeError(f"StopIteration: {error}"))
    else:
        future.set_exception(error)
