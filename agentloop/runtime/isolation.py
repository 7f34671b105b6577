"""Run a tool or reward on the event loop, in threads, or in processes that can be killed.

One event loop runs all episodes, so nothing may block it. `run_in: thread` keeps it free, but a
call that hangs in a thread stays there. `run_in: process` can be killed.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from agentloop.errors import AgentloopError, CallFailed, ImageError
from agentloop.faults import Fault, is_framework, make_fault, user_frames
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


def fault_of(source: str, exc: BaseException) -> Fault | None:
    """Return an exception of user code as a `Fault`; None if user code did not raise it.

    An error of the framework that wraps an exception (`RewardError(...) from exc`) stands for it.
    A server that fails while an agent waits for it is not a fault of the agent, nor is an image
    that cannot be decoded.
    """
    while isinstance(exc, AgentloopError) and not isinstance(exc, ImageError) and exc.__cause__ is not None:
        exc = exc.__cause__
    if isinstance(exc, CallFailed):
        return make_fault(source, exc.message, exc.frames) if exc.frames else None

    frames = user_frames(exc)
    if not frames or (isinstance(exc, AgentloopError) and is_framework(frames[-1][0])):
        return None
    return make_fault(source, describe(exc), frames)


def describe(exc: BaseException) -> str:
    """Return `Type: text` of an exception; for a call in a process, with the original type."""
    return exc.message if isinstance(exc, CallFailed) else f"{type(exc).__name__}: {exc}"
