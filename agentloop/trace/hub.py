"""`TraceHub`: send the episodes of a run to its destinations, each in a thread of its own.

A step hands its records over and never waits. While a destination is unreachable, episodes wait in
memory up to a bound; what is beyond stays in the run directory, is counted and said once, and
`agentloop trace push` sends it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentloop.errors import ExportError
from agentloop.text import clean
from agentloop.trace.exporting import Destination, ExportRun, TracedEpisode, episodes_of, sampled
from agentloop.trace.exports import ExportLog
from agentloop.trace.record import TraceRecord

BATCH = 32
"""Episodes of one call of `SpanExporter.export`, and of one entry in the record of exports."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Pause after a failure; it doubles up to the longest."""

CLOSE_TIMEOUT_S = 10.0
"""How long the end of a run waits for what is still to be sent."""

FAILURES = 3
"""After each so often that a batch fails, its episodes are tried one by one."""

LONGEST_CAUSE = 300

Entry = tuple[str, int, str]
"""Of an episode in the record of exports: trace id, step, `TracedEpisode.content`."""


@dataclass(slots=True)
class ExportCounts:
    """Episodes of one destination: sent, left out as the queue was full, refused by it, waiting."""

    sent: int = 0
    dropped: int = 0
    refused: int = 0
    waiting: int = 0

    @property
    def missing(self) -> int:
        """Episodes that the destination does not have."""
        return self.dropped + self.refused + self.waiting


class TraceHub:
    """The destinations of a run's spans.

    Args:
        destinations: may be empty; then nothing is done.
        run: the run, whose folder keeps the record of what was sent.
        queue_mb: size of the episodes that wait for one destination.
        warn: called from `report` and `close`, in the caller's thread.
    """

    def __init__(
        self, destinations: Sequence[Destination], run: ExportRun, *, queue_mb: int, warn: Callable[[str], None]
    ) -> None:
        self._run = run
        self._warn = warn
        self._said: deque[str] = deque()
        self._log = ExportLog(run.folder / "traces") if destinations else None
        if self._log is not None and self._log.damaged is not None:
            self._said.append(damage_of(self._log.damaged))
        self._threads = [
            ExportThread(destination, self._log, queue_mb * 2**20, self._said.append, run)
            for destination in destinations
            if self._log is not None
        ]

    @property
    def active(self) -> bool:
        """Whether there is a destination."""
        return bool(self._threads)

    def submit(self, records: Iterable[TraceRecord]) -> None:
        """Queue the episodes of a step, those of an episode adjacent; never waits.

        Any thread may call it.
        """
        if self._threads:
            episodes = episodes_of(self._run, records)
            for thread in self._threads:
                thread.put(sampled(episodes, thread.destination.sampling))

    def report(self) -> None:
        """Say what went wrong since the last time."""
        while self._said:
            self._warn(self._said.popleft())

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> dict[str, ExportCounts]:
        """Send what is queued, at most `timeout_s` long; return the counts by destination."""
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.finish()
        for thread in self._threads:
            thread.join(end - time.monotonic())
        counts = {thread.destination.name: thread.counts() for thread in self._threads}
        self._threads = []
        self.report()
        for name, count in counts.items():
            if count.missing:
                self._warn(
                    f"trace.{name}: {count.missing:,} episodes were not sent; all are in the run directory: "
                    f"{push_command(name, self._run)}"
                )
        return counts


class ExportThread:
    """The thread of one destination.

    Args:
        log: what the destination has already; shared with other threads.
        most_bytes: bound of the queue; a single episode may exceed it.
        say: called in the thread with a message for the user.
    """

    def __init__(
        self, destination: Destination, log: ExportLog, most_bytes: int, say: Callable[[str], None], run: ExportRun
    ) -> None:
        self.destination = destination
        self._log = log
        self._address = address_of(destination)
        self._most_bytes = most_bytes
        self._say = say
        self._run = run
        self._counts = ExportCounts()
        self._queue: deque[tuple[TracedEpisode, int]] = deque()
        self._bytes = 0
        self._lock = threading.Condition()
        self._finishing, self._given_up = threading.Event(), threading.Event()
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._work, name=f"trace {destination.name}", daemon=True)
        self._thread.start()

    def put(self, episodes: Sequence[TracedEpisode]) -> None:
        """Queue episodes as far as there is room."""
        with self._lock:
            dropped = 0
            for episode in episodes:
                size = size_of(episode)
                if self._queue and self._bytes + size > self._most_bytes:
                    dropped += 1
                    continue
                self._queue.append((episode, size))
                self._bytes += size
            self._counts.dropped += dropped
            self._lock.notify()
        if dropped:
            self._say_once(
                "full",
                f"trace.{self.destination.name} is slower than the run: episodes from step {episodes[0].main.step} on "
                f"are left out there, but kept in the run directory: {push_command(self.destination.name, self._run)}",
            )

    def finish(self) -> None:
        """End the thread when the queue is empty, or at the next failure."""
        with contextlib.suppress(Exception):  # a library's own; sending goes on as before
            getattr(self.destination.exporter, "finish", lambda: None)()
        with self._lock:
            self._finishing.set()
            self._lock.notify()

    def join(self, timeout_s: float) -> None:
        """Wait for the end; when the time is over, give up."""
        self._thread.join(max(0.0, timeout_s))
        self._given_up.set()
        with contextlib.suppress(Exception):  # a library's own; the run has ended
            self.destination.exporter.close(1.0)

    def counts(self) -> ExportCounts:
        """Return the counts so far."""
        with self._lock:
            self._counts.waiting = len(self._queue)
            return self._counts

    def _work(self) -> None:
        pause, failures = FIRST_PAUSE_S, 0
        while (batch := self._next()) is not None:
            if not self._send(batch):
                if self._finishing.is_set():
                    return
                failures += 1
                if failures % FAILURES or not self._send_singly(batch):
                    self._finishing.wait(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_S)
                    continue
            pause, failures = FIRST_PAUSE_S, 0
            with self._lock:
                for _ in batch:
                    self._bytes -= self._queue.popleft()[1]

    def _next(self) -> list[TracedEpisode] | None:
        """Return the first episodes of the queue, which stay there; None at the end."""
        with self._lock:
            while not self._queue and not self._finishing.is_set():
                self._lock.wait()
            if not self._queue or self._given_up.is_set():
                return None
            return [self._queue[n][0] for n in range(min(BATCH, len(self._queue)))]

    def _send(self, batch: Sequence[TracedEpisode]) -> bool:
        """Send a batch; return whether that is settled, or has to be repeated."""
        try:
            sent, refused = send(self.destination, self._log, self._address, batch)
        except ExportError as exc:
            if not self._given_up.is_set():  # else the end of the run stopped it, which names what is missing
                self._say_once("outage", self._failure(exc))
            return False
        except Exception as exc:  # noqa: BLE001  # a destination never ends a run
            sent, refused = 0, [ExportError(f"{type(exc).__name__}: {exc}")] * len(batch)
        with self._lock:
            self._counts.sent += sent
            self._counts.refused += len(refused)
        if refused:
            self._say_once("refused", self._failure(refused[0]))
        return True

    def _send_singly(self, batch: Sequence[TracedEpisode]) -> bool:
        """Leave out what fails while others arrive; return whether the batch is settled."""
        with self._lock:
            others = [self._queue[n][0] for n in range(len(batch), min(len(batch) + 1, len(self._queue)))]
        try:
            sent, refused = send_singly(self.destination, self._log, self._address, batch, others)
        except Exception:  # noqa: BLE001  # `_send` has said it
            return False
        if self._given_up.is_set():
            return False
        with self._lock:
            self._counts.sent += sent
            self._counts.refused += len(refused)
        if refused:
            self._say_once("left out", self._failure(refused[0]))
        return True

    def _failure(self, exc: ExportError) -> str:
        return (
            f"trace.{self.destination.name}: {clean(exc.message, LONGEST_CAUSE)}; the run continues, and its episodes "
            f"are kept in the run directory: {push_command(self.destination.name, self._run)}"
        )

    def _say_once(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._say(text)


def send(
    destination: Destination, log: ExportLog, address: str, batch: Sequence[TracedEpisode], *, again: bool = False
) -> tuple[int, list[ExportError]]:
    """Send the episodes of a batch that `log` does not have, and note those that arrived.

    Args:
        again: send those that `log` has, too.

    Returns:
        how many arrived; the errors of episodes that the destination refuses.

    Raises:
        ExportError: the destination cannot be reached.
    """
    batch = [episode for episode in batch if episode.spans]
    entries = {episode.trace_id: _entry(episode) for episode in batch}
    if not again:
        batch = _unknown(log, address, batch, entries)
    if not batch:
        return 0, []
    try:
        destination.exporter.export(batch)
    except ExportError as exc:
        if not exc.final:
            raise
        if len(batch) == 1:
            return 0, [exc]
        # One of them is wrong: the others are not lost with it.
        parts = [send(destination, log, address, [episode], again=again) for episode in batch]
        return sum(count for count, _ in parts), [error for _, errors in parts for error in errors]
    log.mark(address, [entries[episode.trace_id] for episode in batch])
    return len(batch), []


def _unknown(
    log: ExportLog, address: str, batch: Sequence[TracedEpisode], entries: Mapping[str, Entry]
) -> list[TracedEpisode]:
    """Return the episodes that a destination does not have."""
    known = log.sent(address, list(entries))
    # A resumed run samples the steps after its checkpoint again: equal episodes with new trace ids.
    new = {trace_id: content for trace_id, (_, _, content) in entries.items() if trace_id not in known}
    contents = log.contents(address, list(new.values()))
    equal = {trace_id for trace_id, content in new.items() if content in contents}
    log.mark(address, [entries[trace_id] for trace_id in equal])
    there = known | equal
    return [episode for episode in batch if episode.trace_id not in there]


def send_singly(
    destination: Destination,
    log: ExportLog,
    address: str,
    batch: Sequence[TracedEpisode],
    others: Sequence[TracedEpisode] = (),
    *,
    again: bool = False,
) -> tuple[int, list[ExportError]]:
    """Send a batch that failed as a whole one by one: one episode may be what the destination
    cannot take, whatever it answers.

    Args:
        others: tried if all of the batch fail; they show whether the destination works.
        again: as for `send`.

    Returns:
        how many arrived, `others` included; the errors of the episodes of the batch that are to be
        left out.

    Raises:
        ExportError: nothing arrives.
    """
    sent, errors = 0, []
    failed: list[TracedEpisode] = []
    last: ExportError | None = None
    for number, episode in enumerate((*batch, *others)):
        if number >= len(batch) and sent:
            break
        try:
            count, refused = send(destination, log, address, [episode], again=again)
        except ExportError as exc:
            last = exc
            failed += [episode] if number < len(batch) else []
            continue
        sent += count
        errors += refused if number < len(batch) else []
    if last is not None and not sent:
        raise last

    for episode in failed:  # once more: an outage may have ended between this one and a later one
        try:
            count, refused = send(destination, log, address, [episode], again=again)
        except ExportError as exc:
            count, refused = 0, [ExportError(f"{episode.key}: {exc.message}", exc.hint)]
        sent += count
        errors += refused
    return sent, errors


def damage_of(path: Path) -> str:
    """Return what to say of a record of exports that was moved aside to `path`."""
    return f"the record of what was sent was damaged and is now {path}: episodes may be sent again, under the same ids"


def _entry(episode: TracedEpisode) -> Entry:
    return episode.trace_id, episode.main.step, episode.content


def address_of(destination: Destination) -> str:
    """Return the name of a destination in the record of what was sent."""
    return f"{destination.name} {destination.exporter.destination}"


def push_command(name: str, run: ExportRun) -> str:
    """Return the command that sends what is missing."""
    return f"agentloop trace push --to {name} {run.folder}"


def size_of(episode: TracedEpisode) -> int:
    """Estimate the bytes that an episode takes in memory."""
    size = 2_000
    for record in episode.records:
        trajectory = record.trajectory
        size += 25 * len(trajectory) + 500 * (len(trajectory.spans) + len(trajectory.messages))
        for message in trajectory.messages:
            content = message["content"]
            size += 2 * len(content) if isinstance(content, str) else 2_000 * len(content)
    return size
