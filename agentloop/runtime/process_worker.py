"""The child program of `processes.ProcessWorkers`: call one function for each message on stdin.

A message is its length and then JSON. The worker answers each twice: `TAKEN` as soon as it has read
the whole message, before it acts on it, and then the result. So a message without `TAKEN` had no
effect and may be sent again.

Output of the function goes to stderr, because stdout carries the answers.
"""

from __future__ import annotations

import asyncio
import fcntl
import inspect
import json
import os
import resource
import sys
from collections.abc import Callable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, BinaryIO

SIZE_BYTES = 4
TAKEN = bytes(SIZE_BYTES)
"""The length 0: the message was read, and the call begins."""

HIGH_FILE = 1000
"""Number of the descriptors of the two pipes, where so many files may be open."""

LONGEST_ERROR = 100_000
"""Characters of an exception's text that are sent back."""

MOST_FRAMES = 64
"""Frames of an exception that are sent back; a recursion has a thousand."""


def main() -> None:
    """Serve calls until stdin ends."""
    # Hide the two pipes: the function gets /dev/null as stdin and stderr as stdout.
    inbox, outbox = os.fdopen(_hidden(0), "rb"), os.fdopen(_hidden(1), "wb")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    call: Callable[[dict[str, Any]], Any] | None = None
    while (message := _read(inbox)) is not None:
        outbox.write(TAKEN)
        outbox.flush()
        try:
            if call is None:  # the first message names the function
                call = _load(message)
                answer: dict[str, Any] = {"value": None}
            else:
                os.environ["TRACEPARENT"] = message.pop("traceparent", None) or ""
                answer = {"value": call(message)}
            text = json.dumps(answer, default=_number)
        except BaseException as exc:  # noqa: BLE001  # the call may also raise SystemExit or KeyboardInterrupt
            text = json.dumps(_failure(exc))

        outbox.write(len(text.encode()).to_bytes(SIZE_BYTES) + text.encode())
        outbox.flush()


def _hidden(file: int) -> int:
    """Return a copy of a descriptor with a high number, which no program writes to by accident."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = HIGH_FILE if most == resource.RLIM_INFINITY else min(HIGH_FILE, most - 8)
    return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, max(3, lowest))


def _read(inbox: BinaryIO) -> dict[str, Any] | None:
    size = inbox.read(SIZE_BYTES)
    if len(size) < SIZE_BYTES:
        return None
    message: dict[str, Any] = json.loads(inbox.read(int.from_bytes(size)))
    return message


def _failure(exc: BaseException) -> dict[str, Any]:
    """Return the answer for an exception: its text, and where the function raised it."""
    from agentloop.faults import user_frames

    return {"error": f"{type(exc).__name__}: {exc}"[:LONGEST_ERROR], "frames": user_frames(exc)[-MOST_FRAMES:]}


def _load(hello: Mapping[str, Any]) -> Callable[[dict[str, Any]], Any]:
    from agentloop.registry import load_reference

    sys.path.extend(entry for entry in hello["path"] if entry not in sys.path)

    if hello["memory_mb"] is not None:
        limit = int(hello["memory_mb"]) << 20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    function = load_reference(hello["reference"], Path(hello["folder"]), hello["group"])
    if inspect.iscoroutinefunction(function):
        plain = function

        def function(*args: Any, **kwargs: Any) -> Any:
            return asyncio.run(plain(*args, **kwargs))

    return {"tool": _tool, "reward": _reward}[hello["form"]](function)


def _tool(function: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
    from agentloop.types import ToolResult, bounded_text, result_text

    def call(message: dict[str, Any]) -> Any:
        result = function(**message["arguments"])
        if not isinstance(result, ToolResult):
            return {"text": bounded_text(result_text(result))}
        if result.images:
            raise TypeError("a tool in a process cannot return images: use run_in: thread")
        text = bounded_text(result.text) if isinstance(result.text, str) else result.text
        return {"text": text, "reward": result.reward, "error": result.error, "metrics": result.metrics}

    return call


def _reward(function: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
    from agentloop.types import Task, Trajectory

    def call(message: dict[str, Any]) -> Any:
        return function(Task(**message["task"]), message["text"], Trajectory.from_json(message["trajectory"]))

    return call


def _number(value: Any) -> int | float:
    """Convert the numbers of numpy, torch, decimal and fractions for JSON; refuse other types."""
    from agentloop.numbers import real_number

    if isinstance(value, Integral):
        return int(value)
    try:
        return real_number(value)
    except TypeError:
        raise TypeError(f"the result holds {type(value).__name__}, which is not JSON") from None


if __name__ == "__main__":
    main()
