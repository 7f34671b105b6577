"""Measure how late the event loop is, and find what blocks it.

One loop runs all episodes: a tool that blocks it for 200 ms delays every episode by 200 ms, and no
other metric shows it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

TICK_S = 0.02
"""Interval of the measurement. A callback every 20 ms costs less than a thousandth of a core."""

_STDLIB = sysconfig.get_paths()["stdlib"]
_LOOP_FILES = tuple(str(Path(asyncio.__file__).parent / name) for name in ("runners.py", "base_events.py", "events.py"))
MACHINE = "another process that had the core"
COLLECTOR = "Python's garbage collector"
WAITING = "a wait of the framework, for instance for a process that starts"
UNKNOWN = "unidentified code"

_OURS = (
    *(f"{Path(__file__).parents[2] / package}{os.sep}" for package in ("agentloop", "rollout_server", "trainer")),
    f"{Path(sysconfig.get_paths()['purelib']) / 'psutil'}{os.sep}",
    f"{Path(asyncio.__file__).parent}{os.sep}",
)
"""Folders of the framework itself, and of what it calls on the loop. Code of its `tools` and
`recipes` is treated like a user's."""


@dataclass(slots=True)
class Culprit:
    """Something that blocked the event loop.

    Attributes:
        place: `file:line function` that the loop's thread was running.
        task: name of the asyncio task that ran.
        count: number of late ticks attributed to it.
        worst_s: the longest of these lags.
    """

    place: str
    task: str
    count: int = 0
    worst_s: float = 0.0

    @property
    def is_code(self) -> bool:
        """Whether a function can be fixed, as opposed to the machine or the collector."""
        return self.place not in (MACHINE, COLLECTOR, WAITING, UNKNOWN)

    def __str__(self) -> str:
        times = "once" if self.count == 1 else f"{self.count} times"
        return f"{self.place} (in {self.task}) blocked the event loop {times}, for up to {self.worst_s:.2f} s"


class LoopLagMonitor:
    """Measure the lag of the running event loop; a context manager.

    Lag is how much later than scheduled a callback runs. While a tick is late, a watchdog thread
    samples the stack of the loop's thread: the culprit is the innermost function outside Python's
    standard library. The framework's own code is a culprit only while it computes: where it waits
    in the kernel or for Python's lock, what it waits for is the cause.

    Args:
        bound_s: lag above which a culprit is recorded.
        waited_s: seconds since the last call in which the loop's thread was ready but had no core;
            None: ask Linux.
    """

    def __init__(self, bound_s: float = 0.05, waited_s: Callable[[], float] | None = None) -> None:
        self._bound_s = bound_s
        self._lags: list[float] = []
        self._culprits: dict[str, Culprit] = {}
        self._said: set[str] = set()
        self._suspect: tuple[str, str] | None = None
        self._due = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._thread_id = 0
        self._stopped = threading.Event()
        self._watchdog: threading.Thread | None = None
        self._scheduler = _Scheduler()
        self._waited_s = waited_s or self._scheduler.waited_s
        self._collecting_s = 0.0
        self._collection_began = 0.0
        self._cpu = 0.0

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        gc.callbacks.append(self._on_collection)
        self._scheduler.open()
        self._cpu = time.thread_time()
        self._schedule()
        self._watchdog = threading.Thread(target=self._watch, name="agentloop lag", daemon=True)
        self._watchdog.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._timer is not None:
            self._timer.cancel()
        gc.callbacks.remove(self._on_collection)
        self._scheduler.close()

    def take(self) -> dict[str, float]:
        """Return `loop/lag_max_s` and `loop/lag_p99_s` since the last call."""
        lags, self._lags = sorted(self._lags), []
        if not lags:
            return {"loop/lag_max_s": 0.0, "loop/lag_p99_s": 0.0}
        return {"loop/lag_max_s": lags[-1], "loop/lag_p99_s": lags[min(len(lags) - 1, int(0.99 * len(lags)))]}

    @property
    def culprits(self) -> list[Culprit]:
        """Everything that blocked the loop for longer than the bound, the worst first."""
        return sorted(self._culprits.values(), key=lambda culprit: -culprit.worst_s)

    def new_culprits(self) -> list[Culprit]:
        """Return the culprits that were not returned before."""
        found = [culprit for culprit in self.culprits if culprit.place not in self._said]
        self._said.update(culprit.place for culprit in found)
        return found

    def _schedule(self) -> None:
        assert self._loop is not None
        self._due = time.monotonic() + TICK_S
        self._timer = self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        lag = max(0.0, time.monotonic() - self._due)
        self._lags.append(lag)

        # Read on every tick, because it counts since the last call. Check machine and collector #
        # first: during both, the stack shows an innocent function.
        waited = self._waited_s()
        cpu, before = time.thread_time(), self._cpu
        self._cpu = cpu
        if lag > self._bound_s:
            if waited > lag / 2:
                place, task = MACHINE, "no task"
            elif self._collecting_s > lag / 2:
                place, task = COLLECTOR, "no task"
            else:
                place, task = self._suspect or (UNKNOWN, "no task")
                if place.startswith(_OURS) and cpu - before < lag / 2:
                    place, task = WAITING, "no task"
            culprit = self._culprits.setdefault(place, Culprit(place, task))
            culprit.count += 1
            culprit.worst_s = max(culprit.worst_s, lag)

        self._suspect = None
        self._collecting_s = 0.0
        self._schedule()

    def _on_collection(self, phase: str, info: dict[str, int]) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._collection_began = now
        else:
            self._collecting_s += now - self._collection_began

    def _watch(self) -> None:
        while not self._stopped.wait(self._bound_s / 2):
            due = self._due
            if time.monotonic() - due > self._bound_s / 2:
                seen = self._look()
                if seen is not None and due == self._due:  # the same tick is still late
                    self._suspect = seen

    def _look(self) -> tuple[str, str] | None:
        """Return the function and task that the loop's thread is in; None: it runs no callback."""
        frame: FrameType | None = sys._current_frames().get(self._thread_id)
        inner: FrameType | None = None
        found: FrameType | None = None
        while frame is not None and not frame.f_code.co_filename.startswith(_LOOP_FILES):
            inner = inner or frame
            if found is None and not frame.f_code.co_filename.startswith((_STDLIB, "<frozen")):
                found = frame
            frame = frame.f_back

        culprit = found or inner
        if culprit is None or Path(culprit.f_code.co_filename).name == "selectors.py":  # idle
            return None

        assert self._loop is not None
        task = asyncio.current_task(self._loop)
        code = culprit.f_code
        return f"{code.co_filename}:{culprit.f_lineno} {code.co_qualname}", task.get_name() if task else "a callback"


class _Scheduler:
    """Counts seconds in which a thread was ready but had no core (Linux; 0 elsewhere)."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._before = 0

    def open(self) -> None:
        """Count for the calling thread from now on."""
        with contextlib.suppress(OSError):
            self._file = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
        self.waited_s()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def waited_s(self) -> float:
        """Return the seconds counted since the last call."""
        if self._file is None:
            return 0.0
        total = int(os.pread(self._file, 128, 0).split()[1])
        waited, self._before = total - self._before, total
        return waited * 1e-9
