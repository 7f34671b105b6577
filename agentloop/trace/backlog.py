"""`Backlog`: what a destination does not have yet of a run's traces, and how it gets it.

A run's sender process and `agentloop trace push` send with it. Episodes are read from the trace
files, so that nothing waits in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentloop.errors import ConfigError, ExportError
from agentloop.trace.exporting import Destination, ExportRun, TracedEpisode, chosen_groups, episodes_of, is_trace_id
from agentloop.trace.exports import ExportLog
from agentloop.trace.store import TraceFile, TraceStore

BATCH = 32
"""Episodes of one call of `SpanExporter.export`, and of one entry in the record of exports."""

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
    """

    def __init__(
        self,
        destination: Destination,
        run: ExportRun,
        log: ExportLog,
        *,
        everything: bool = False,
        again: bool = False,
    ) -> None:
        self.store = TraceStore(run.folder)
        self._destination = destination
        self._run = run
        self._log = log
        self._address = address_of(destination)
        self._everything = everything
        self._again = again

    # -- what is missing

    def missing(self, file: TraceFile) -> Missing:
        """Find what is missing of a trace file.

        Raises:
            TraceError: the file is cut or gone.
            DiskError: the record of exports cannot be read.
        """
        tables = [table for _, table in self.store.scan(COLUMNS, files=[file])]
        if not tables:
            self.store.file(file.step, file.split).open()  # says why it cannot be read
        groups: set[str] = set()
        ids: dict[str, str] = {}
        without_spans = 0
        for row in itertools.chain.from_iterable(table.to_pylist() for table in tables):
            if row["part"] != row["parts"] - 1:
                continue
            groups.add(row["group_id"])
            if is_trace_id(row["trace_id"]):
                ids[row["trace_id"]] = row["group_id"]
            else:
                without_spans += 1
        if not self._everything:
            chosen = chosen_groups(file.split, file.step, groups, self._destination.sampling)
            ids = {trace_id: group for trace_id, group in ids.items() if group in chosen}
        known = set() if self._again else self._log.sent(self._address, list(ids))
        return Missing(frozenset(ids.keys() - known), len(known), without_spans)

    def batches(self, file: TraceFile, missing: Missing) -> Iterator[list[TracedEpisode]]:
        """Read what is missing of a file, at most `BATCH` episodes at a time, in their order.

        Raises:
            TraceError: the file is cut or gone.
        """
        wanted = missing.trace_ids
        episodes = episodes_of(self._run, self.store.iterate(file.step, file.split)) if wanted else iter(())
        chosen = (episode for episode in episodes if episode.main.trajectory.trace_id in wanted)
        while batch := list(itertools.islice(chosen, BATCH)):
            yield batch

    # -- send it

    def send(self, batch: Sequence[TracedEpisode]) -> tuple[int, list[ExportError]]:
        """Send the episodes of a batch that the destination does not have, and note those that
        arrived.

        Returns:
            how many arrived; the errors of episodes that the destination refuses, or that its
            exporter cannot convert.

        Raises:
            ExportError: the destination cannot be reached.
            ConfigError: its exporter cannot work in this environment.
            DiskError: the record of exports cannot be read or written.
        """
        batch = [episode for episode in batch if episode.spans]
        entries = {episode.trace_id: _entry(episode) for episode in batch}
        if not self._again:
            batch = self._unknown(batch, entries)
        if not batch:
            return 0, []
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
                return 0, [error]
            # One of them is wrong: the others are not lost with it.
            parts = [self.send([episode]) for episode in batch]
            return sum(count for count, _ in parts), [error for _, errors in parts for error in errors]
        self._log.mark(self._address, [entries[episode.trace_id] for episode in batch])
        return len(batch), []

    def send_singly(
        self, batch: Sequence[TracedEpisode], others: Sequence[TracedEpisode] = ()
    ) -> tuple[int, list[ExportError]]:
        """Send a batch that failed as a whole one by one: one episode may be what the destination
        cannot take, whatever it answers.

        Args:
            others: tried if all of the batch fail; they show whether the destination works.

        Returns:
            how many arrived, `others` included; the errors of the episodes of the batch that are to
            be left out.

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
                count, refused = self.send([episode])
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
                count, refused = self.send([episode])
            except ExportError as exc:
                count, refused = 0, [ExportError(f"{episode.key}: {exc.message}", exc.hint)]
            sent += count
            errors += refused
        return sent, errors

    def _unknown(self, batch: Sequence[TracedEpisode], entries: Mapping[str, Entry]) -> list[TracedEpisode]:
        """Return the episodes that the destination does not have."""
        known = self._log.sent(self._address, list(entries))
        # A resumed run samples the steps after its checkpoint again: equal episodes, new trace ids.
        new = {trace_id: content for trace_id, (_, _, content) in entries.items() if trace_id not in known}
        contents = self._log.contents(self._address, list(new.values()))
        equal = {trace_id for trace_id, content in new.items() if content in contents}
        self._log.mark(self._address, [entries[trace_id] for trace_id in equal])
        there = known | equal
        return [episode for episode in batch if episode.trace_id not in there]


def damage_of(path: Path) -> str:
    """Return what to say of a record of exports that was moved aside to `path`."""
    return f"the record of what was sent was damaged and is now {path}: episodes may be sent again, under the same ids"


def address_of(destination: Destination) -> str:
    """Return the name of a destination in the record of what was sent."""
    return f"{destination.name} {destination.exporter.destination}"


def push_command(name: str, run: ExportRun) -> str:
    """Return the command that sends what is missing."""
    return f"agentloop trace push --to {name} {run.folder}"


def _entry(episode: TracedEpisode) -> Entry:
    return episode.trace_id, episode.main.step, episode.content
