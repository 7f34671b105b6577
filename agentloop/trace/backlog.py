"""`Backlog`: what a destination does not have yet of a run's traces, and how it gets it.

A run's sender process and `agentloop trace push` send with it. Episodes are read from the trace
files, so that nothing waits in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from agentloop.errors import ConfigError, ExportError
from agentloop.trace.exporting import Destination, ExportRun, TracedEpisode, chosen_groups, episodes_of, is_trace_id
from agentloop.trace.exports import ExportLog, RecordUnavailable
from agentloop.trace.file_lock import Held, locked
from agentloop.trace.store import TraceFile, TraceStore
from agentloop.trace.store.files import row_errors

BATCH, BATCH_TOKENS = 128, 100_000
"""Episodes of one call of `SpanExporter.export`, and of one entry in the record of exports; and
tokens, beyond which they are fewer: they are in memory."""

TURN_S = 60.0
"""How long to wait while another process sends a batch to the same destination."""

Entry = tuple[str, int, str]
"""Of an episode in the record of exports: trace id, step, `TracedEpisode.content`."""

COLUMNS = ("trace_id", "group_id", "part", "parts")


@dataclass(frozen=True, slots=True)
class Missing:
    """What a destination does not have of one trace file.

    Attributes:
        trace_ids: of the episodes that are to be sent.
        known: episodes that it has.
        without_spans: episodes of older versions; they cannot be sent.
    """

    trace_ids: frozenset[str]
    known: int
    without_spans: int


class Backlog:
    """One destination, and the record of what it has.

    Args:
        log: of the run; several destinations may share it.
        everything: ignore the sampling of the destination's section.
        again: ignore what is noted as sent: the destination lost what it had confirmed.
        warn: called with a text when another process holds the destination for too long.

    Attributes:
        arrived: episodes that were sent and confirmed.
    """

    def __init__(
        self,
        destination: Destination,
        run: ExportRun,
        log: ExportLog,
        *,
        everything: bool = False,
        again: bool = False,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.store = TraceStore(run.folder)
        self._destination = destination
        self._run = run
        self._log = log
        self._address = address_of(destination)
        self._everything = everything
        self._again = again
        self._warn = warn
        self._unnoted: dict[str, Entry] = {}  # arrived, but the record could not be written
        self.arrived = 0
        self._beside = ""  # who held the destination for so long that it is not waited for again

    # -- what is missing

    def missing(self, file: TraceFile) -> Missing:
        """Find what is missing of a trace file.

        Raises:
            TraceError: the file is cut, damaged or gone.
            RecordUnavailable: the record of exports cannot be read.
        """
        groups: set[str] = set()
        ids: dict[str, str] = {}
        without_spans = 0
        table = self.store.columns(file, COLUMNS)
        with row_errors(file):
            for row in table.to_pylist():
                if row["parts"] - row["part"] != 1:  # raises if one is null
                    continue
                groups.add(row["group_id"])
                if is_trace_id(row["trace_id"]):
                    ids[row["trace_id"]] = row["group_id"]
                else:
                    without_spans += 1
        if not self._everything:
            chosen = chosen_groups(file.split, file.step, groups, self._destination.sampling)
            ids = {trace_id: group for trace_id, group in ids.items() if group in chosen}
        known = set() if self._again else self._known(list(ids))
        return Missing(frozenset(ids.keys() - known), len(known), without_spans)

    def batches(self, file: TraceFile, missing: Missing) -> Iterator[list[TracedEpisode]]:
        """Read what is missing of a file, in batches of at most `BATCH` episodes, in their order.

        Raises:
            TraceError: the file is cut, damaged or gone.
        """
        wanted = missing.trace_ids
        episodes = episodes_of(self._run, self.store.iterate(file.step, file.split)) if wanted else iter(())
        batch: list[TracedEpisode] = []
        tokens = 0
        for episode in episodes:
            if episode.main.trajectory.trace_id not in wanted:
                continue
            batch.append(episode)
            tokens += sum(len(record.trajectory) for record in episode.records)
            if len(batch) == BATCH or tokens >= BATCH_TOKENS:
                yield batch
                batch, tokens = [], 0
        if batch:
            yield batch

    # -- send it

    def send(self, batch: Sequence[TracedEpisode]) -> tuple[int, list[ExportError]]:
        """Send the episodes of a batch that the destination does not have, and note those that
        arrived. Another process that sends to the same destination waits meanwhile.

        Returns:
            how many arrived; the errors of episodes that the destination refuses, or that its
            exporter cannot convert.

        Raises:
            ExportError: the destination cannot be reached.
            ConfigError: its exporter cannot work in this environment.
            RecordUnavailable: the record of exports cannot be read or written; nothing was sent.
        """
        with self._turn():
            return self._send(batch)

    def _send(self, batch: Sequence[TracedEpisode]) -> tuple[int, list[ExportError]]:
        self.note()
        batch, entries, odd = _entries([episode for episode in batch if episode.spans])
        if not self._again:
            batch = self._unknown(batch, entries)
        if not batch:
            return 0, odd
        self._log.check_writable()  # else each later push would send the same again
        try:
            self._destination.exporter.export(batch)
        except ConfigError:
            raise
        except MemoryError as exc:  # of an answer without end, for instance: what it held is free again
            raise ExportError("the answer, or the episodes, take more memory than there is") from exc
        except Exception as exc:
            error = exc if isinstance(exc, ExportError) else ExportError(f"{type(exc).__name__}: {exc}", final=True)
            if not error.final:
                raise
            if len(batch) == 1:
                return 0, [*odd, error]
            # One of them is wrong: the others are not lost with it.
            parts = [self._send([episode]) for episode in batch]
            return sum(count for count, _ in parts), [*odd, *(error for _, errors in parts for error in errors)]
        self.arrived += len(batch)
        self._unnoted |= {episode.trace_id: entries[episode.trace_id] for episode in batch}
        with contextlib.suppress(RecordUnavailable):  # `note` tries again
            self.note()
        return len(batch), odd

    @property
    def unnoted(self) -> list[str]:
        """Trace ids of episodes that arrived, and that the record does not have: see `note`."""
        return list(self._unnoted)

    def note(self) -> None:
        """Note what arrived while the record could not be written.

        Raises:
            RecordUnavailable: it still cannot.
        """
        self._log.mark(self._address, self._unnoted.values())
        self._unnoted.clear()

    def send_singly(
        self, batch: Sequence[TracedEpisode], others: Sequence[TracedEpisode] = (), *, limit_s: float = math.inf
    ) -> tuple[int, list[ExportError]]:
        """Send a batch that failed as a whole one by one: one episode may be what the destination
        cannot take, whatever it answers.

        Args:
            others: tried if all of the batch fail; they show whether the destination works.
            limit_s: how long to try while nothing arrives.

        Returns:
            how many arrived, `others` included; the errors of the episodes of the batch that are to
            be left out.

        Raises:
            ExportError: nothing arrives, or the destination cannot be reached.
            RecordUnavailable: as `send`.
        """
        sent, errors = 0, []
        failed: list[TracedEpisode] = []
        last: ExportError | None = None
        end = time.monotonic() + limit_s
        for number, episode in enumerate((*batch, *others)):
            if number >= len(batch) and sent:
                break
            try:
                count, refused = self.send([episode])
            except ExportError as exc:
                if exc.unreachable or (not sent and time.monotonic() > end):
                    raise
                last = exc
                failed += [episode] if number < len(batch) else []
                continue
            sent += count
            errors += refused if number < len(batch) else []
        if last is not None and not sent:
            raise last

        for episode in failed:  # once more: an outage may have ended between this one and a later one
            try:
                count, refused = self.send([episode])
            except ExportError as exc:
                if exc.unreachable:
                    raise
                count, refused = 0, [ExportError(f"{episode.key}: {exc.message}", exc.hint)]
            sent += count
            errors += refused
        return sent, errors

    def _unknown(self, batch: Sequence[TracedEpisode], entries: Mapping[str, Entry]) -> list[TracedEpisode]:
        """Return the episodes that the destination does not have."""
        known = self._known(list(entries))
        # A resumed run samples the steps after its checkpoint again: equal episodes, new trace ids.
        new = {trace_id: content for trace_id, (_, _, content) in entries.items() if trace_id not in known}
        contents = self._log.contents(self._address, list(new.values()))
        equal = {trace_id for trace_id, content in new.items() if content in contents}
        self._log.mark(self._address, [entries[trace_id] for trace_id in equal])
        there = known | equal
        return [episode for episode in batch if episode.trace_id not in there]

    def _known(self, trace_ids: Sequence[str]) -> set[str]:
        return self._log.sent(self._address, trace_ids) | (self._unnoted.keys() & set(trace_ids))

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the destination: what is checked, sent and noted here is not sent by others.

        A process that stands still while it holds it is not waited for without end: ids are the
        same, so an episode that is sent twice is one.
        """
        digest = hashlib.blake2b(self._address.encode("utf-8", "replace"), digest_size=8).hexdigest()
        path = self.store.folder / f"exports.{digest}.lock"
        with contextlib.ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(path, TURN_S, beside=self._beside))
            except Held as exc:
                if not exc.holder or exc.holder != self._beside:
                    self._beside = exc.holder
                    self._warn(
                        f"{exc} has been sending to {self._destination.name} for {TURN_S:g} s and holds {path}: it is "
                        "not waited for any longer; end it if it stands still"
                    )
            except OSError as exc:
                raise RecordUnavailable(
                    f"{path}: {exc.strerror or exc}", "free space, or correct the permissions of its folder"
                ) from exc
            yield


def address_of(destination: Destination) -> str:
    """Return the name of a destination in the record of what was sent."""
    return f"{destination.name} {destination.exporter.destination}"


def push_command(name: str, run: ExportRun) -> str:
    """Return the command that sends what is missing."""
    return f"agentloop trace push --to {name} {run.folder}"


def _entries(
    batch: Sequence[TracedEpisode],
) -> tuple[list[TracedEpisode], dict[str, Entry], list[ExportError]]:
    """Return the episodes that have an entry, these by trace id, and the errors of the others: a
    foreign file may hold anything."""
    good: list[TracedEpisode] = []
    entries: dict[str, Entry] = {}
    odd: list[ExportError] = []
    for episode in batch:
        try:
            entries[episode.trace_id] = (episode.trace_id, episode.main.step, episode.content)
            good.append(episode)
        except Exception as exc:  # noqa: BLE001
            odd.append(ExportError(f"{episode.key}: {type(exc).__name__}: {exc}", final=True))
    return good, entries, odd
