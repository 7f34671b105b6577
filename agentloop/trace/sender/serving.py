"""The sender process, from the inside.

It reads lines of JSON: first `{"trace", "run"}`, the section of the recipe and the run; then
`{"step", "split"}` for each trace file; last `{"finish": seconds}`. It writes the messages of
`Delivery`, a line of JSON each. It ends with the process that started it.
"""

from __future__ import annotations

import gc
import json
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentloop.trace.sender.delivery import Delivery
    from agentloop.trace.sender.indexing import Indexing

LOOK_S = 1.0
"""How often it looks whether the run still exists: a program that the run started may hold its end
of the pipe."""

COLLECT_EVERY = (10_000, 10, 10)
"""Thresholds of Python's garbage collector. With its default of 700 new objects, a tenth of the
time of sending goes to looking through what waits for the answer of a receiver."""


def main(parent: int) -> None:
    """Send the episodes of the run whose process is `parent`, which started this one."""
    out = os.dup(1)
    os.dup2(2, 1)  # keep what libraries print out of the pipe of messages
    lock = threading.Lock()

    def tell(message: dict[str, Any]) -> None:
        with lock:
            os.write(out, json.dumps(message).encode() + b"\n")

    finished = _serve(_lines(parent), tell)
    os._exit(0 if finished else 1)  # threads of libraries would be waited for


def _serve(lines: Iterator[bytes], tell: Callable[[dict[str, Any]], None]) -> bool:
    """Follow the run's lines; return whether it said that it ends."""
    if (first := next(lines, None)) is None:
        return False
    threads: list[Delivery | Indexing] = []
    for line in lines:
        message = json.loads(line)
        if (timeout_s := message.get("finish")) is not None:
            end = time.monotonic() + timeout_s
            for thread in threads:
                thread.finish()
            for thread in threads:
                thread.join(end - time.monotonic())
            return True
        threads = threads or _start(json.loads(first), tell)
        for thread in threads:
            thread.put(message["step"], message["split"])
    return False


def _start(first: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> list[Delivery | Indexing]:
    # Imported here, so that a run that has written nothing yet has none of it in memory.
    import pyarrow as pa

    from agentloop.config import TraceConfig
    from agentloop.trace.exporting import ExportRun, load_destinations
    from agentloop.trace.exports import ExportLog
    from agentloop.trace.sender.delivery import Delivery
    from agentloop.trace.sender.indexing import Indexing
    from agentloop.trace.sender.memory import bound_memory

    config = TraceConfig.model_validate(first["trace"])
    run = ExportRun(**{**first["run"], "folder": Path(first["run"]["folder"])})
    if not config.exporters:  # what those of other packages need is not known
        bound_memory()
    pa.set_cpu_count(1)  # each of its threads reserves memory
    gc.set_threshold(*COLLECT_EVERY)
    log = ExportLog(run.folder / "traces", warn=lambda text: tell({"say": text}))
    deliveries = [Delivery(destination, run, log, tell) for destination in load_destinations(config, run)]
    return [*deliveries, Indexing(run.folder)]


def _lines(parent: int) -> Iterator[bytes]:
    """Yield the lines of the standard input until it is closed, or `parent` has ended."""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    rest = b""
    while os.getppid() == parent:
        if not poll.poll(LOOK_S * 1000):
            continue
        data = os.read(0, 2**16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
