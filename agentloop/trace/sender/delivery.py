"""`Delivery`: a thread of the sender process that brings trace files to one destination.

The files wait in the run directory, so an outage only delays: it is said once, and tried again. So
does a record of exports that is locked or cannot be written.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from agentloop.errors import AgentloopError, ExportError, TraceError
from agentloop.text import clean
from agentloop.trace.backlog import Backlog, push_command
from agentloop.trace.exporting import Destination, ExportRun, TracedEpisode
from agentloop.trace.exports import ExportLog, RecordUnavailable
from agentloop.trace.store import TraceFile

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Pause after a failure; it doubles up to the longest."""

FAILURES = 3
"""After each so often that a batch fails, its episodes are tried one by one."""

LONGEST_CAUSE = 300

Batch = list[TracedEpisode]


class Delivery:
    """The thread of one destination: one file after the other, in the order of `put`.

    Args:
        log: what the destination has already; shared with other threads.
        tell: called in the thread with a message for the run: `{"say": text}`; `{"at": name,
            "step", "split"}` when it begins a file; `{"done": name, "step", "split"}` when the
            destination has all that it is to have of it; `{"unnoted": name, "ids"}`, the trace ids
            that arrived and could not be noted.
    """

    def __init__(
        self, destination: Destination, run: ExportRun, log: ExportLog, tell: Callable[[dict[str, Any]], None]
    ) -> None:
        self._name = destination.name
        self._exporter = destination.exporter
        self._backlog = Backlog(destination, run, log, warn=lambda text: self._say_once("turn", text))
        self._run = run
        self._tell = tell
        self._files: deque[TraceFile] = deque()
        self._lock = threading.Condition()
        self._finishing, self._given_up = threading.Event(), threading.Event()
        self._complete = True
        self._unnoted: list[str] = []  # as last sent
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._work, name=f"trace {self._name}", daemon=True)
        self._thread.start()

    def put(self, step: int, split: str) -> None:
        """Send what a trace file holds; never waits."""
        with self._lock:
            self._files.append(TraceFile(step, split, self._backlog.store.path(step, split)))
            self._lock.notify()

    def finish(self) -> None:
        """End the thread when no file waits, or at the next failure."""
        with self._lock:
            self._finishing.set()
            self._lock.notify()

    def join(self, timeout_s: float) -> None:
        """Wait for the end; when the time is over, give up."""
        self._thread.join(max(0.0, timeout_s))
        self._given_up.set()
        with contextlib.suppress(Exception):  # a library's own; the run has ended
            self._exporter.close(1.0)

    def _work(self) -> None:
        at: TraceFile | None = None
        pause = FIRST_PAUSE_S
        while (file := self._next()) is not None:
            if file != at:
                at, pause = file, FIRST_PAUSE_S
                self._tell({"at": self._name, "step": file.step, "split": file.split})
            try:
                if not self._deliver(file):
                    break
            except RecordUnavailable as exc:
                if not self._given_up.is_set():
                    self._say_once("record", exc)
                if self._finishing.is_set():
                    break
                self._finishing.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            except Exception as exc:  # noqa: BLE001  # a file that cannot be read does not stop the others
                self._complete = False
                self._say_once(f"unread {file.path}", exc)
            if self._complete:
                self._tell({"done": self._name, "step": file.step, "split": file.split})
            with self._lock:
                self._files.popleft()
        self._note_last()

    def _note_last(self) -> None:
        """Note what arrived and could not be noted, or say it."""
        try:
            self._backlog.note()
        except RecordUnavailable as exc:
            self._tell_unnoted()
            count = len(self._backlog.unnoted)
            self._tell(
                {
                    "say": f"trace.{self._name}: {count:,} episodes arrived that could not be noted "
                    f"({clean(exc.message, LONGEST_CAUSE)}): the next push sends them again, under the same ids"
                }
            )

    def _next(self) -> TraceFile | None:
        """Return the first file, which stays there; None at the end."""
        with self._lock:
            while not self._files and not self._finishing.is_set():
                self._lock.wait()
            return None if not self._files or self._given_up.is_set() else self._files[0]

    def _deliver(self, file: TraceFile) -> bool:
        """Send what is missing of a file; return whether that is settled, or the run has ended."""
        self._complete = True
        batches = self._backlog.batches(file, self._backlog.missing(file))
        ahead: deque[Batch] = deque()
        while batch := ahead.popleft() if ahead else next(batches, None):
            pause, failures = FIRST_PAUSE_S, 0
            while True:
                last = self._finishing.is_set()  # what the end of the run finds under way is tried once more
                if self._send(batch):
                    break
                if last:
                    return False
                failures += 1
                if failures % FAILURES == 0:
                    ahead.extend(itertools.islice(batches, 0 if ahead else 1))
                    if self._send_singly(batch, ahead[0] if ahead else None):
                        break
                self._finishing.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
        return True

    def _send(self, batch: Batch) -> bool:
        """Send a batch; return whether that is settled, or has to be repeated."""
        try:
            _, refused = self._backlog.send(batch)
        except ExportError as exc:
            if not self._given_up.is_set():  # else the end of the run stopped it, which names what is missing
                self._say_once("outage", exc)
            return False
        except RecordUnavailable:
            raise
        except Exception as exc:  # noqa: BLE001  # no key
            refused = [exc if isinstance(exc, ExportError) else ExportError(f"{type(exc).__name__}: {exc}")]
        self._tell_unnoted()
        self._note("refused", refused)
        return True

    def _send_singly(self, batch: Batch, following: Batch | None) -> bool:
        """Leave out what fails while others arrive; return whether the batch is settled."""
        try:
            others = (following or next(self._waiting(), []))[:1]
            _, refused = self._backlog.send_singly(batch, others)
        except RecordUnavailable:
            raise
        except Exception:  # noqa: BLE001  # `_send` has said it
            return False
        if self._given_up.is_set():
            return False
        self._note("left out", refused)
        return True

    def _waiting(self) -> Iterator[Batch]:
        """Yield the episodes of the files behind the first."""
        with self._lock:
            files = list(self._files)[1:]
        for file in files:
            with contextlib.suppress(TraceError):  # it is said when it is the first
                yield from self._backlog.batches(file, self._backlog.missing(file))

    def _tell_unnoted(self) -> None:
        if (ids := self._backlog.unnoted) != self._unnoted:
            self._unnoted = ids
            self._tell({"unnoted": self._name, "ids": ids})

    def _note(self, kind: str, refused: Sequence[ExportError]) -> None:
        if refused:
            self._complete = False
            self._say_once(kind, refused[0])

    def _say_once(self, kind: str, what: Exception | str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            if isinstance(what, AgentloopError):
                what = what.message
            elif isinstance(what, Exception):
                what = f"{type(what).__name__}: {what}"
            self._tell(
                {
                    "say": f"trace.{self._name}: {clean(what, LONGEST_CAUSE)}; the run continues, and its episodes "
                    f"are kept in the run directory: {push_command(self._name, self._run)}"
                }
            )
