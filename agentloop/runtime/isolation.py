"""Run a tool or reward on the event loop, in threads, or in processes that can be killed.

One event loop runs all episodes, so nothing may block it. `run_in: thread` keeps it free, but a
call that hangs in a thread stays there. `run_in: process` can be killed.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from agentloop.errors import CallFailed
from agentloop.runtime.processes import ProcessWorkers
from agentloop.runtime.threads import ThreadWorkers

RunIn = Literal["inline", "thread", "process"]

DEFAULT_WORKERS = {"thread": 8, "process": 2}
"""Concurrent calls. Each computing thread keeps Python's lock from the event loop for 5 ms."""

Caller = Callable[..., Awaitable[Any]]


def isolate(
    function: Callable[..., Any], run_in: RunIn, *, workers: int | None, name: str, process: Callable[[int], Caller]
) -> Caller:
    """Return an async function that runs `function` as `run_in` says.

    Args:
        function: plain or async. An async one runs on the event loop, unless `run_in` is process.
        workers: concurrent calls; None: `DEFAULT_WORKERS`.
        process: creates the caller for processes, given the number of workers.
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
    """End the threads or processes that `isolate` started."""
    if isinstance(caller, ThreadWorkers | ProcessWorkers):
        caller.close()


def describe(exc: BaseException) -> str:
    """Return `Type: text` of an exception; for a call in a process, with the original type."""
    return exc.message if isinstance(exc, CallFailed) else f"{type(exc).__name__}: {exc}"
