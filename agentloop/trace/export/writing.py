"""Write an export: streaming, whole or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from agentloop.errors import AgentloopError, TraceError
from agentloop.files import json_line, open_atomic
from agentloop.text import clean, counted
from agentloop.trace.export.atif import AtifRun, atif_document
from agentloop.trace.export.rows import Skipped, message_row, record_rows, sft_row
from agentloop.trace.record import TraceRecord

FORMATS = ("jsonl", "parquet", "atif", "messages", "sft")

Episode = Sequence[TraceRecord]


class NothingWritten(AgentloopError):
    """Every selected episode was left out of an export; the message has the reasons."""


@dataclass(slots=True)
class ExportRun:
    """What an export says of itself.

    Attributes:
        skipped: episodes that have no such form, by reason.
    """

    episodes: int = 0
    rows: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def export(
    episodes: Iterable[Episode],
    form: str,
    out: Path | BinaryIO,
    run: AtifRun,
    *,
    on_episode: Callable[[], None] = lambda: None,
) -> ExportRun:
    """Write episodes in one of `FORMATS`.

    Args:
        out: a file, which appears when it is complete; or a stream.
        run: what the rows have in common; all forms but `jsonl` and `parquet` write its tools.
        on_episode: called after each episode.

    Raises:
        DiskError: the disk is full or broken.
        TraceError: a single ATIF document (`.json`) is asked for, and there are several episodes or
            none.
        NothingWritten: every episode was left out.
    """
    done = ExportRun()

    def counted() -> Iterator[Episode]:
        for episode in episodes:
            done.episodes += 1
            yield episode
            on_episode()

    opened: AbstractContextManager[BinaryIO] = open_atomic(out) if isinstance(out, Path) else nullcontext(out)
    with opened as file:
        if form == "parquet":
            _write_parquet(counted(), file, done)
        elif form == "atif" and isinstance(out, Path) and out.suffix == ".json":
            _write_document(counted(), file, run, done)
        else:
            for row in _rows(counted(), form, run, done):
                file.write(json_line(row))
                done.rows += 1
        if done.skipped and not done.rows:  # inside: the file does not appear
            raise _nothing(done.skipped)
    return done


def _nothing(skipped: Counter[str]) -> NothingWritten:
    left_out = "; ".join(f"{counted(count, 'episode')} left out: {reason}" for reason, count in skipped.most_common())
    return NothingWritten(
        f"nothing is written: {clean(left_out)}",
        "select others with the filters of `agentloop trace list`; `agentloop trace show` shows how an episode ended",
    )


def _rows(episodes: Iterable[Episode], form: str, run: AtifRun, done: ExportRun) -> Iterator[dict[str, Any]]:
    for episode in episodes:
        if form == "jsonl":
            yield from record_rows(episode)
        elif form == "atif":
            yield atif_document(episode, run)
        elif form == "messages":
            yield message_row(episode, run.tools)
        else:
            try:
                yield sft_row(episode, run.tools)
            except Skipped as reason:
                done.skipped[str(reason)] += 1


def _write_document(episodes: Iterable[Episode], file: BinaryIO, run: AtifRun, done: ExportRun) -> None:
    """Write the only episode as one document.

    Raises:
        TraceError: there is none, or another one.
    """
    for episode in episodes:
        if done.rows:
            raise TraceError(
                "a .json file holds one ATIF document, and several episodes are selected",
                "select one episode (--key), or give a .jsonl file: one document a line",
            )
        file.write(json_line(atif_document(episode, run)))
        done.rows += 1
    if not done.rows:
        raise TraceError("no episode is selected: a .json file holds one ATIF document", "change the filters")


def _write_parquet(episodes: Iterable[Episode], file: BinaryIO, done: ExportRun) -> None:
    """Write the store's own columns (docs/traces.md), of the selected episodes."""
    import pyarrow.parquet as pq

    from agentloop.trace.store.encode import encode, estimate
    from agentloop.trace.store.images import Digests
    from agentloop.trace.store.schema import FORMAT, METADATA_KEY, SCHEMA
    from agentloop.trace.store.writer import OPTIONS, ROW_GROUP_BYTES

    schema = SCHEMA.with_metadata({METADATA_KEY: orjson.dumps({"format": FORMAT})})
    digests = Digests(lambda digest, data: None)  # images stay in the run's folder
    with pq.ParquetWriter(file, schema, **OPTIONS) as writer:

        def flush(batch: list[TraceRecord]) -> None:
            if batch:
                writer.write_table(encode(batch, digests).replace_schema_metadata(schema.metadata))

        waiting: list[TraceRecord] = []
        size = 0
        for episode in episodes:
            waiting += episode
            size += estimate(episode)
            done.rows += len(episode)
            if size >= ROW_GROUP_BYTES:
                flush(waiting)
                waiting, size = [], 0
        flush(waiting)
