"""`TraceStore`: the traces of a run directory, written and read."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from agentloop.errors import TraceError
from agentloop.files import remove_abandoned
from agentloop.trace.record import SPLITS, RecordKey, TraceRecord
from agentloop.trace.store.checks import Problem, find_problems
from agentloop.trace.store.choice import choose
from agentloop.trace.store.decode import decode
from agentloop.trace.store.encode import encode, estimate, integer_cell, text_cell
from agentloop.trace.store.files import PARQUET, TraceFile, leftovers, list_files, row_errors, step_folders
from agentloop.trace.store.images import Digests, ImageFolder
from agentloop.trace.store.old_form import read_old_records
from agentloop.trace.store.schema import CHEAP, KEY, SCHEMA
from agentloop.trace.store.writer import OPTIONS, Written, write_file


class TraceStore:
    """The traces of a run directory.

    traces/step_N/{train,eval}.parquet   one row a trajectory (`schema.SCHEMA`)
    traces/images/<sha256>.<ext>         each image once

    Traces that earlier versions wrote as JSON lines are read too (`agentloop trace import` converts
    them). All methods block; call them from a thread where an event loop runs.

    Args:
        run_dir: need not exist.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.folder = run_dir / "traces"
        self.images = ImageFolder(self.folder / "images")

    # -- write

    def path(self, step: int, split: str) -> Path:
        """Return where a step's trace is written."""
        return self.folder / f"step_{step}" / f"{split}{PARQUET}"

    def write(
        self,
        step: int,
        split: str,
        records: Iterable[TraceRecord],
        *,
        max_bytes: int | None = None,
        seed: int = 0,
    ) -> Written:
        """Write the trace of a step, whole or not at all; an earlier one is replaced.

        Args:
            records: of this step and split, the trajectories of an episode one after another.
            max_bytes: of the file; whole groups beyond it are left out (`choice.choose`). Failed
                and rejected episodes are always kept.
            seed: decides with `step` which groups are kept.

        Raises:
            DiskError: the disk is full or broken.
            ValueError: a record is not of this step and split.
        """
        every = list(records)
        for record in every:
            if record.step != step or record.split != split:
                raise ValueError(f"{record.key} is not a record of {split}/{step}")

        path, limit = self.path(step, split), max_bytes
        while True:
            choice = choose(every, limit, seed, _ratio)
            kept = choice.records
            size = write_file(path, kept, Digests(self.images.keep), choice)
            # The ratio of the first groups is a guess: others compress worse.
            if max_bytes is None or limit is None or size <= max_bytes or len(kept) == _unhealthy(every):
                break
            limit = int(limit * min(0.95, max_bytes / size))
        remove_abandoned(path)
        return Written(
            path,
            trajectories=len(kept),
            tokens=sum(len(record.trajectory.token_ids) for record in kept),
            size=size,
            left_out_groups=choice.left_out_groups,
            left_out_episodes=choice.left_out_episodes,
        )

    def rewind(self, step: int) -> None:
        """Remove everything written after `step`, and what killed writes left."""
        for number, folder in step_folders(self.folder).items():
            if number > step:
                shutil.rmtree(folder, ignore_errors=True)
        for path in leftovers(self.folder):
            path.unlink(missing_ok=True)

    # -- read

    def files(self, split: str | None = None) -> list[TraceFile]:
        """Return the trace files by step and split."""
        return list_files(self.folder, split)

    def file(self, step: int, split: str) -> TraceFile:
        """Return the trace file of a step.

        Raises:
            TraceError: there is none.
        """
        for found in list_files(self.folder, split):
            if found.step == step:
                return found
        raise TraceError(f"{self.folder} has no {split} trace of step {step}", _steps_hint(self.steps(split)))

    def steps(self, split: str) -> list[int]:
        """Return the steps that have a trace of a split, in order."""
        return [file.step for file in list_files(self.folder, split)]

    def records(self, step: int, split: str) -> list[TraceRecord]:
        """Return all trajectories of a step, in the order in which they were written.

        Raises:
            TraceError: the trace is missing, cut or of another format.
        """
        file = self.file(step, split)
        if file.old:
            return read_old_records(file, self.images)
        return self._decode(file, self._table(file))

    def iterate(self, step: int, split: str) -> Iterator[TraceRecord]:
        """Yield the trajectories of a step, one row group in memory at a time.

        Raises:
            TraceError: as `records`.
        """
        file = self.file(step, split)
        if file.old:
            yield from read_old_records(file, self.images)
            return
        with file.open() as parquet:
            for number in range(parquet.num_row_groups):
                yield from self._decode(file, _read(file, parquet, [number]))

    def record(self, key: str) -> TraceRecord:
        """Return one trajectory.

        Raises:
            TraceError: there is none with this key, or its file is cut.
        """
        wanted = _parse(key)
        file = self.file(wanted.step, wanted.split)
        if file.old:
            found = [record for record in read_old_records(file, self.images) if record.key == key]
        else:
            with file.open() as parquet:
                found = [
                    record
                    for number in _row_groups_of(file, parquet, wanted)
                    for record in self._decode(file, _matching(_read(file, parquet, [number]), wanted))
                    if record.key == key
                ]
        if not found:
            raise TraceError(f"{file.path} has no trajectory {key}", "see `agentloop trace list`")
        return found[0]

    def episode(self, key: str) -> list[TraceRecord]:
        """Return all trajectories of the episode that a key belongs to, the main one last.

        Raises:
            TraceError: as `record`.
        """
        first = _parse(key)
        parts = self.record(str(first._replace(part=0))).parts
        return [self.record(str(first._replace(part=part))) for part in range(parts)]

    def episodes(self, step: int, split: str) -> list[list[TraceRecord]]:
        """Return the episodes of a step; each is its trajectories, the main one last.

        Raises:
            TraceError: as `records`.
        """

        def episode(record: TraceRecord) -> tuple[str, int]:
            return record.trajectory.group_id, record.trajectory.sample_index

        return [list(group) for _, group in groupby(self.records(step, split), episode)]

    def scan(
        self, columns: Sequence[str] = CHEAP, *, split: str | None = None, files: Sequence[TraceFile] | None = None
    ) -> Iterator[tuple[TraceFile, pa.Table]]:
        """Yield some columns of every trace file; files that cannot be read are left out
        (`problems` names them).

        Args:
            columns: of `schema.SCHEMA`; the default has no tokens and no long texts.
            files: of `files()`; None: all.
        """
        for file in self.files(split) if files is None else files:
            try:
                table = self.columns(file, columns)
            except TraceError:
                continue
            yield file, table

    def columns(self, file: TraceFile, columns: Sequence[str] = CHEAP) -> pa.Table:
        """Return some columns of a trace file.

        Args:
            columns: as of `scan`.

        Raises:
            TraceError: the file is missing, cut, damaged or of another format, or lacks a column.
        """
        if file.old:
            records = read_old_records(file, self.images)
            with row_errors(file):
                return encode(records, Digests(lambda digest, data: None)).select(list(columns))
        with file.open() as parquet:
            return _read(file, parquet, None, columns)

    def metadata(self, step: int, split: str) -> dict[str, Any]:
        """Return what the writer recorded about a step's trace, such as `left_out_groups`.

        Raises:
            TraceError: the trace is missing or cut.
        """
        file = self.file(step, split)
        return {} if file.old else file.metadata()

    def problems(self) -> list[Problem]:
        """Return the files that are missing, cut, left over or of the old form; reads no rows."""
        return find_problems(self.run_dir)

    def _decode(self, file: TraceFile, table: pa.Table) -> list[TraceRecord]:
        with row_errors(file):
            return decode(table, self.images)

    def _table(self, file: TraceFile) -> pa.Table:
        with file.open() as parquet:
            return _read(file, parquet, None, SCHEMA.names)


def _read(
    file: TraceFile, parquet: pq.ParquetFile, row_groups: list[int] | None, columns: Sequence[str] | None = None
) -> pa.Table:
    names = list(columns) if columns is not None else SCHEMA.names
    missing = set(names) - set(parquet.schema_arrow.names)
    if missing:
        raise TraceError(f"{file.path} has no column {sorted(missing)[0]}", "delete it")
    try:
        if row_groups is None:
            return parquet.read(names)
        return parquet.read_row_groups(row_groups, names)
    except (OSError, pa.ArrowException) as exc:
        why = " ".join(str(exc).split())
        raise TraceError(f"{file.path} is cut or damaged: {why}", "restore it from a copy, or delete it") from exc


def _row_groups_of(file: TraceFile, parquet: pq.ParquetFile, key: RecordKey) -> Iterator[int]:
    """Yield the numbers of the row groups that hold a key."""
    for number in range(parquet.num_row_groups):
        if len(_matching(_read(file, parquet, [number], KEY), key)):
            yield number


def _matching(table: pa.Table, key: RecordKey) -> pa.Table:
    # The columns hold what comes closest to a text or number that they cannot hold.
    sample, group = integer_cell(key.sample_index)[0], text_cell(key.group_id)[0]
    part = integer_cell(key.part)[0]
    same = pc.and_(pc.equal(table["sample_index"], sample), pc.equal(table["part"], part))
    return table.filter(pc.and_(same, pc.equal(table["group_id"], group)))


def _parse(key: str) -> RecordKey:
    try:
        return RecordKey.parse(key)
    except ValueError:
        splits = " or ".join(SPLITS)
        raise TraceError(
            f"{key!r} is not the key of a trajectory", f"keys look like train/12/<group>/<sample>/<part> ({splits})"
        ) from None


def _steps_hint(steps: Sequence[int]) -> str:
    if not steps:
        return "the run wrote none; see trace.train_every and eval.log_generations"
    return f"steps with a trace: {steps[0]}" + (f" to {steps[-1]} ({len(steps)})" if len(steps) > 1 else "")


def _unhealthy(records: Sequence[TraceRecord]) -> int:
    return sum(record.trajectory.status != "ok" for record in records)


def _ratio(records: Sequence[TraceRecord]) -> float:
    """Return compressed bytes of records, divided by `estimate` of them."""
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, SCHEMA, **OPTIONS) as writer:
        writer.write_table(encode(records, Digests(lambda digest, data: None)))
    return buffer.tell() / max(1, estimate(records))
