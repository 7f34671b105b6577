"""Events of runs as they go on: one watcher for all readers, which polls files cheaply."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import orjson

from agentloop.viewer.api.run import Run
from agentloop.viewer.api.runs import Runs
from agentloop.web.refusals import Refusal

_log = logging.getLogger(__name__)

POLL_S = 1.0
HEARTBEAT_S = 15.0
"""Seconds between comments that keep a connection open, and show that its reader is gone."""

MOST_READERS = 64
MOST_WAITING = 256
"""Readers at a time, and events that one of them may be behind: then it is told to load again."""

RETRY_MS = 2_000


@dataclass(frozen=True, slots=True)
class Seen:
    """The state of a run when it was last looked at."""

    step: int
    traces: int
    live: bool
    finished: bool


class Events:
    """Sends events `{run, kind, step}` to all readers; `kind` is one of:

    step      metrics or the trace of a step are there
    finished  the run ended: it is finished, or its process is gone
    run       a run appeared, started again or disappeared; `step` is null in the last case. If
              `run` is null too, this reader was too slow, and events are missing
    call      calls of a weave client or spans of OpenTelemetry came; `run` is null

    Args:
        arrivals: counts what came from other programs.
    """

    def __init__(self, runs: Runs, arrivals: Callable[[], int] = lambda: 0) -> None:
        self._runs = runs
        self._arrivals = arrivals
        self._readers: set[asyncio.Queue[dict[str, Any]]] = set()
        self._watcher: asyncio.Task[None] | None = None

    def publish(self, event: dict[str, Any]) -> None:
        """Send an event to all readers. Call it in the event loop."""
        for queue in self._readers:
            if queue.full():
                while not queue.empty():
                    queue.get_nowait()
                event = {"run": None, "kind": "run", "step": None}
            queue.put_nowait(event)

    def subscribe(self) -> AsyncIterator[bytes]:
        """Return the stream of one reader, in the form of server-sent events.

        Raises:
            Refusal: there are too many readers.
        """
        if len(self._readers) >= MOST_READERS:
            raise Refusal(503, f"{MOST_READERS} pages wait for events already", "close some, or poll /api/runs")
        return self._stream()

    async def _stream(self) -> AsyncIterator[bytes]:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MOST_WAITING)
        self._readers.add(queue)
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())
        try:
            yield f"retry: {RETRY_MS}\n\n".encode()
            while True:
                try:
                    event = await asyncio.wait_for(queue.get(), HEARTBEAT_S)
                except TimeoutError:
                    yield b": waiting\n\n"
                    continue
                yield b"event: " + event["kind"].encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"
        finally:
            self._readers.discard(queue)

    async def _watch(self) -> None:
        """Poll until there is no reader."""
        seen: dict[str, Seen] | None = None
        arrived = self._arrivals()
        while self._readers:
            try:
                now = await asyncio.to_thread(self._look)
            except OSError as exc:  # a folder went away while it was read
                _log.warning("runs cannot be watched: %s", exc)
                now = seen or {}
            for event in _changes(now if seen is None else seen, now):
                self.publish(event)
            seen = now
            if arrived != (arrived := self._arrivals()):
                self.publish({"run": None, "kind": "call", "step": None})
            await asyncio.sleep(POLL_S)

    def _look(self) -> dict[str, Seen]:
        return {run.id: _state(run) for run in self._runs.all()}


def _state(run: Run) -> Seen:
    steps = [int(row["step"]) for row in run.record.rows[-1:]]
    return Seen(steps[0] if steps else 0, run.trace_changes(), run.live, run.finished)


def _changes(before: dict[str, Seen], now: dict[str, Seen]) -> list[dict[str, Any]]:
    """Return what changed between two looks."""
    events: list[dict[str, Any]] = [
        {"run": run, "kind": "run", "step": None} for run in sorted(before.keys() - now.keys())
    ]
    for run, state in now.items():
        earlier = before.get(run)
        if earlier is None or (state.live and not earlier.live):
            events.append({"run": run, "kind": "run", "step": state.step})
        elif (state.step, state.traces) != (earlier.step, earlier.traces):
            events.append({"run": run, "kind": "step", "step": state.step})
        if earlier is not None and ((earlier.live and not state.live) or (state.finished and not earlier.finished)):
            events.append({"run": run, "kind": "finished", "step": state.step})
    return events
