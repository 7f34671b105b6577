"""`TraceIndex`: kept up to date with the trace files, and asked for episodes."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from agentloop.errors import TraceError
from agentloop.trace.index import tables
from agentloop.trace.index.database import NAME, Damaged, Database, Unavailable, remove, temporary_copy
from agentloop.trace.index.query import EpisodeFilter, Sort
from agentloop.trace.index.rows import read_rows, short
from agentloop.trace.index.tables import Failure, Signature
from agentloop.trace.record import RecordKey
from agentloop.trace.store import TraceFile, TraceStore

T = TypeVar("T")

MOST_ATTEMPTS = 4
"""Of an operation: with the file as it is, rebuilt, and in a temporary folder."""

KEPT_ORDERS = 8
"""Sorted results kept in memory: pages of one view, and the neighbours of an episode."""


@dataclass(frozen=True, slots=True)
class Page:
    """A part of the episodes that a filter finds."""

    total: int
    rows: list[dict[str, Any]]


class TraceIndex:
    """The index of one run's trace. All methods may be called from any thread; they block.

    The file lies in `traces/`. Where that cannot be written, or there is none, a temporary file
    serves until `close`.

    Args:
        run_dir: need not exist.
        temporary: whether a temporary file may be used; False: `refresh` raises `TraceError`.
    """

    def __init__(self, run_dir: Path, *, temporary: bool = True) -> None:
        self.store = TraceStore(run_dir)
        self._temporary = temporary
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._waits = False
        self._closing = False
        self._rebuilt = False
        self._database: Database | None = None
        self._lock = threading.RLock()
        self._writing = threading.Lock()
        self._orders: OrderedDict[tuple[int, EpisodeFilter, Sort], array[int]] = OrderedDict()
        self._classes: OrderedDict[tuple[int, EpisodeFilter], dict[int, int]] = OrderedDict()

    def close(self) -> None:
        """Close the file; remove it if it is a temporary one. A `refresh` in another thread ends
        with the trace file that it reads."""
        self._closing = True
        with self._lock:
            self._leave()
            if self._folder is not None:
                self._folder.cleanup()
                self._folder = None

    # -- keep up to date

    def refresh(self) -> bool:
        """Bring the index up to date with the trace files; return whether anything changed.

        Cheap if nothing did: it lists the folder. Files that cannot be read are left out, and
        `problems` names them. If another process is writing the index, it does the work.

        Raises:
            TraceError: the index can neither be written nor read.
        """
        with self._writing:
            self._closing = False
            return self._with_database(self._refresh)

    def add(self, step: int, split: str) -> None:
        """Bring the index up to date with one trace file, as the run that has just written it does.

        Raises:
            TraceError: as `refresh`.
        """
        path = self.store.path(step, split)

        def index(database: Database) -> None:
            if (signature := _signature(path)) is not None:
                self._index_file(database, TraceFile(step, split, path), _name(path), signature)

        with self._writing:
            self._with_database(index)

    def problems(self) -> list[dict[str, str]]:
        """Return the trace files that could not be read: `{file, problem}`."""

        def read(database: Database) -> list[dict[str, str]]:
            with database.connection() as connection:
                rows = connection.execute("SELECT name, problem FROM files WHERE problem IS NOT NULL ORDER BY step")
                return [{"file": name, "problem": problem} for name, problem in rows]

        return self._with_database(read)

    def _refresh(self, database: Database) -> bool:
        files = {_name(file.path): file for file in self.store.files()}
        present = {name: found for name, file in files.items() if (found := _signature(file.path)) is not None}
        with database.connection() as connection:
            indexed = tables.indexed(connection)
        gone = indexed.keys() - present.keys()
        changed = [name for name, signature in present.items() if indexed.get(name) != signature]
        try:
            if gone:
                with database.transaction() as connection:
                    for name in gone:
                        tables.remove_file(connection, name)
                    tables.count_change(connection)
            for name in changed:
                if self._closing:
                    return True
                self._index_file(database, files[name], name, present[name])
        except Unavailable as exc:
            if "locked" in str(exc) or "busy" in str(exc):
                return False
            raise
        return bool(gone or changed)

    def _index_file(self, database: Database, file: TraceFile, name: str, signature: Signature) -> None:
        """Index one file in one transaction; one that cannot be read gets its problem."""
        with database.transaction() as connection:
            if tables.indexed(connection, name).get(name) == signature:
                connection.execute("ROLLBACK")
                connection.execute("BEGIN")  # another process was faster
                return
            tables.remove_file(connection, name)
            number = tables.add_file(connection, file, name, signature)
            connection.execute("SAVEPOINT file")
            try:
                tables.add_episodes(connection, number, read_rows(self.store, file))
            except sqlite3.IntegrityError as exc:
                if not self._rebuilt:  # the tables may be another version's
                    raise
                self._record_problem(connection, number, exc)
            except sqlite3.Error:
                raise
            except Exception as exc:  # noqa: BLE001  # a file may hold anything, and must not stop the others
                self._record_problem(connection, number, exc)
            tables.count_change(connection)

    @staticmethod
    def _record_problem(connection: sqlite3.Connection, number: int, exc: Exception) -> None:
        connection.execute("ROLLBACK TO file")
        problem = exc.message if isinstance(exc, TraceError) else f"it cannot be read: {short(repr(exc))}"
        stored = problem.encode("utf-8", "replace").decode()
        connection.execute("UPDATE files SET problem = ? WHERE id = ?", (stored, number))

    # -- ask

    @property
    def generation(self) -> int:
        """A number that changes with the index."""

        def read(database: Database) -> int:
            with database.connection() as connection:
                return tables.generation(connection)

        return self._with_database(read)

    def query(
        self, wanted: EpisodeFilter | None = None, sort: Sort | None = None, *, offset: int = 0, limit: int = 50
    ) -> Page:
        """Return episodes `offset` to `offset + limit` of those that a filter finds.

        Raises:
            SearchError: the filter's search cannot be understood.
        """

        def read(database: Database) -> Page:
            with database.connection() as connection:
                ids = self._order(connection, wanted or EpisodeFilter(), sort or Sort())
                return Page(len(ids), tables.rows_of(connection, ids[offset : offset + limit]))

        return self._with_database(read)

    def around(self, key: str, wanted: EpisodeFilter, sort: Sort) -> dict[str, Any]:
        """Return the place of an episode among those that a filter finds, and its neighbours' keys:
        `{total, index, previous, next}`; index is -1 if it is not among them."""

        def read(database: Database) -> dict[str, Any]:
            with database.connection() as connection:
                ids = self._order(connection, wanted, sort)
                number = tables.id_of(connection, RecordKey.parse(key))
                index = ids.index(number) if number is not None and number in ids else -1
                before = ids[index - 1 : index] if index > 0 else []
                after = ids[index + 1 : index + 2] if index >= 0 else []
                keys = [next((row["key"] for row in tables.rows_of(connection, one)), None) for one in (before, after)]
                return {"total": len(ids), "index": index, "previous": keys[0], "next": keys[1]}

        return self._with_database(read)

    def facets(self, wanted: EpisodeFilter | None = None) -> dict[str, dict[str, int]]:
        """Count the values of each column of `FACETS` among the episodes that a filter finds, each
        facet without the filter's own choice of its values."""
        wanted = wanted or EpisodeFilter()

        def read(database: Database) -> dict[str, dict[str, int]]:
            with database.connection() as connection:
                number = tables.generation(connection)

                def count(one: EpisodeFilter) -> dict[int, int]:
                    if (known := self._recall(self._classes, (number, one))) is None:
                        known = tables.count_classes(connection, one)
                        self._remember(self._classes, (number, one), known)
                    return known

                return tables.facets(connection, wanted, count)

        return self._with_database(read)

    def bounds(self) -> dict[str, Any]:
        """Return counts: `{episodes, failed, bytes, splits: {split: {episodes, steps, ...}}}`."""

        def read(database: Database) -> dict[str, Any]:
            with database.connection() as connection:
                rows = connection.execute(
                    "SELECT split, sum(episodes), min(step), max(step), count(*), sum(failed), sum(size) FROM files"
                    " GROUP BY split"
                ).fetchall()
            splits = {
                split: {"episodes": count, "first_step": first, "last_step": last, "steps": steps}
                for split, count, first, last, steps, *_ in rows
            }
            totals = {name: sum(row[i] for row in rows) for name, i in (("episodes", 1), ("failed", 5), ("bytes", 6))}
            return {**totals, "splits": splits}

        return self._with_database(read)

    def group(self, step: int, split: str, group_id: str) -> list[dict[str, Any]]:
        """Return the episodes of a group by sample."""
        return self._where("step = ? AND split = ? AND group_id = ? ORDER BY sample_index", (step, split, group_id))

    def task(self, task_id: str, limit: int) -> list[dict[str, Any]]:
        """Return at most `limit` episodes of a task, by step."""
        return self._where("task_id = ? ORDER BY step, split, group_id, sample_index LIMIT ?", (task_id, limit))

    def of_trace(self, trace_id: str) -> list[dict[str, Any]]:
        """Return the episodes that were traced under an id: one, unless a file was copied."""
        return self._where("id IN (SELECT id FROM texts WHERE trace_id = ?) ORDER BY id", (trace_id,))

    def failures(self) -> list[Failure]:
        """Return failed and rejected episodes by cause, the most frequent first."""

        def read(database: Database) -> list[Failure]:
            with database.connection() as connection:
                return tables.failures(connection)

        return self._with_database(read)

    def _where(self, condition: str, values: Sequence[Any]) -> list[dict[str, Any]]:
        def read(database: Database) -> list[dict[str, Any]]:
            with database.connection() as connection:
                ids = [row[0] for row in connection.execute(f"SELECT id FROM episodes WHERE {condition}", values)]  # noqa: S608
                return tables.rows_of(connection, ids)

        return self._with_database(read)

    def _order(self, connection: sqlite3.Connection, wanted: EpisodeFilter, sort: Sort) -> array[int]:
        """Return the ids that a filter finds, sorted."""
        number = tables.generation(connection)
        if (known := self._recall(self._orders, (number, wanted, sort))) is None:
            known, classes = tables.find(connection, wanted, sort)
            self._remember(self._orders, (number, wanted, sort), known)
            if classes is not None:
                self._remember(self._classes, (number, wanted), classes)
        return known

    def _recall(self, kept: OrderedDict[Any, T], name: Any) -> T | None:
        with self._lock:
            if name in kept:
                kept.move_to_end(name)
            return kept.get(name)

    def _remember(self, kept: OrderedDict[Any, T], name: Any, value: T) -> None:
        with self._lock:
            kept[name] = value
            while len(kept) > KEPT_ORDERS:
                kept.popitem(last=False)

    # -- the file

    def _with_database(self, use: Callable[[Database], T]) -> T:
        """Call a function with the open file; rebuild a damaged one, leave one that is unavailable.

        Raises:
            TraceError: no file can be used.
        """
        fault, rebuilt = "", False
        for _ in range(MOST_ATTEMPTS):
            path = None
            try:
                with self._lock:
                    path = self._place()
                    database = self._open(path)
                if rebuilt:
                    self._refresh(database)
                return use(database)
            except Damaged as exc:
                fault, rebuilt = str(exc), True
                self._rebuilt = True
                with self._lock:
                    self._leave()
                    remove(path or self.store.folder / NAME)
            except Unavailable as exc:
                fault = str(exc)
                with self._lock:
                    self._leave()
                    if not self._temporary or self._folder is not None:
                        break
                    self._folder = temporary_copy(self.store.folder / NAME)
                    self._waits = False
        raise TraceError(
            f"the index of {self.store.folder} cannot be used: {fault}", f"delete {self.store.folder / NAME}"
        )

    def _place(self) -> Path:
        """Return where the file lies now."""
        if self._folder is not None and self._waits and self.store.folder.is_dir():
            self._leave()  # the run has begun to write traces
            self._folder.cleanup()
            self._folder = None
        if self._folder is None and not self.store.folder.is_dir():
            if not self._temporary:
                raise Unavailable(f"{self.store.folder} does not exist")
            self._folder, self._waits = temporary_copy(None), True
        return (self.store.folder if self._folder is None else Path(self._folder.name)) / NAME

    def _open(self, path: Path) -> Database:
        if self._database is not None and (self._database.path != path or self._database.replaced):
            self._leave()
        if self._database is None:
            self._database = Database(path)
        return self._database

    def _leave(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None


def _name(path: Path) -> str:
    """Return how a trace file is called in the index: `step_3/train.parquet`."""
    return f"{path.parent.name}/{path.name}"


def _signature(path: Path) -> Signature | None:
    """Return what changes when a file is written again; None: it is gone."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
