"""The record of what was sent where, `traces/exports.sqlite`: each episode goes out once."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from agentloop.errors import DiskError
from agentloop.trace.file_lock import Held, locked

FILE = "exports.sqlite"
DAMAGED_FILE = f"{FILE}.damaged"

BUSY_TIMEOUT_S = 10.0
"""How long to wait for another process that writes, such as `agentloop trace push` beside a run."""

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
"""Errors that mean that the file does not hold what it should."""

CHUNK = 500
"""Ids in one statement; sqlite bounds their number."""

INSERT = "INSERT OR REPLACE INTO sent VALUES (?, ?, ?, ?, ?)"

T = TypeVar("T")

Identity = tuple[int, int] | None
"""Which file a path leads to; None: to none."""


class RecordUnavailable(DiskError):
    """The record cannot be read or written now: it is locked, or the disk is full or read-only."""


class _Damaged(Exception):
    """The file does not hold what it should."""


class ExportLog:
    """The episodes that a destination has confirmed, by trace id. Threads may share it.

    A destination is an exporter's name and address. If the process dies between the confirmation
    and the entry here, the episode is sent again; its ids are the same, so receivers keep one.

    The file is opened when it is first needed, and again when another process has replaced it. A
    damaged one is moved aside, whenever that is found, and a new one begun.

    Args:
        folder: `traces` of a run directory.
        warn: called with a text when a damaged file was moved aside.
        busy_timeout_s: how long to wait for another process that writes.

    Raises, each of its methods:
        RecordUnavailable: the file cannot be opened, read or written.
    """

    def __init__(
        self, folder: Path, *, warn: Callable[[str], None] = lambda _: None, busy_timeout_s: float = BUSY_TIMEOUT_S
    ) -> None:
        self._path = folder / FILE
        self._warn = warn
        self._busy_timeout_s = busy_timeout_s
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._identity: Identity = None  # of the file that is open, or was last tried

    def sent(self, destination: str, trace_ids: Sequence[str]) -> set[str]:
        """Return those of the ids that the destination has."""
        return self._found(destination, "trace_id", trace_ids)

    def contents(self, destination: str, contents: Sequence[str]) -> set[str]:
        """Return those of the contents (`TracedEpisode.content`) that the destination has, under
        whatever trace id: a resumed run samples the steps after its checkpoint again."""
        return self._found(destination, "content", contents)

    def _found(self, destination: str, column: str, values: Sequence[str]) -> set[str]:
        def find(db: sqlite3.Connection) -> set[str]:
            found: set[str] = set()
            for begin in range(0, len(values), CHUNK):
                some = values[begin : begin + CHUNK]
                marks = ",".join("?" * len(some))
                query = f"SELECT {column} FROM sent WHERE destination = ? AND {column} IN ({marks})"  # noqa: S608
                found |= {row[0] for row in db.execute(query, (destination, *some))}
            return found

        return set() if self._is_empty() else self._with_database(find)

    def mark(self, destination: str, episodes: Iterable[tuple[str, int, str]]) -> None:
        """Note confirmed episodes: (trace id, step, content)."""
        now = time.time()
        rows = [(destination, trace_id, step, now, content) for trace_id, step, content in episodes]
        if rows:
            self._with_database(lambda db: _write(db, rows, "COMMIT"))

    def check_writable(self) -> None:
        """Find out whether an entry can be written now; leaves none."""
        rows = [("", f"{number:032x}", 0, 0.0, f"{number:032x}") for number in range(32)]
        self._with_database(lambda db: _write(db, rows, "ROLLBACK"))

    def counts(self) -> dict[str, int]:
        """Return the number of episodes by destination."""
        query = "SELECT destination, count(*) FROM sent GROUP BY destination ORDER BY 1"
        return {} if self._is_empty() else self._with_database(lambda db: dict(db.execute(query)))

    def close(self) -> None:
        """Close the file. A later call of another method opens it again."""
        with self._lock:
            self._disconnect()

    # -- the file

    def _is_empty(self) -> bool:
        """Whether nothing was written yet: to read, no file is made, which may be impossible."""
        with self._named():
            try:
                return self._path.stat().st_size == 0
            except FileNotFoundError:
                return True

    def _with_database(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what `work` returns; once more with a new file if it finds this one damaged."""
        with self._lock, self._named():
            try:
                return self._tried(work)
            except _Damaged:
                self._replace()
            try:
                return self._tried(work)
            except _Damaged as exc:  # the disk damages what is written
                raise self._failed(exc) from exc

    def _tried(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return work(self._connection())
        except sqlite3.Error as exc:
            if _means_damage(exc):
                raise _Damaged(str(exc)) from exc
            raise

    def _connection(self) -> sqlite3.Connection:
        if self._db is not None and _identity(self._path) != self._identity:
            self._disconnect()  # another process moved it aside, or the user deleted it
        if self._db is None:
            self._db = self._open()
        return self._db

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._identity = _identity(self._path)
            db = sqlite3.connect(
                self._path, timeout=self._busy_timeout_s, check_same_thread=False, isolation_level=None
            )
            try:
                db.execute(
                    "CREATE TABLE IF NOT EXISTS sent (destination TEXT, trace_id TEXT, step INTEGER, time REAL, "
                    "content TEXT, PRIMARY KEY (destination, trace_id)) WITHOUT ROWID"
                )
                db.execute("CREATE INDEX IF NOT EXISTS by_content ON sent (destination, content)")
            except sqlite3.Error as exc:
                db.close()
                if _code(exc) == sqlite3.SQLITE_ERROR:  # it holds something else
                    raise _Damaged(str(exc)) from exc
                raise
            found = _identity(self._path)
            if self._identity in (None, found):
                self._identity = found
                return db
            db.close()  # replaced since then

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _replace(self) -> None:
        """Move the damaged file aside, unless another process has done so."""
        self._disconnect()
        try:
            with locked(self._path.with_name(f"{FILE}.lock"), BUSY_TIMEOUT_S):
                if _identity(self._path) != self._identity:
                    return
                # Its journal would be applied to the next one.
                for suffix in ("-journal", "-wal", "-shm"):
                    journal = self._path.with_name(FILE + suffix)
                    if journal.exists():
                        journal.replace(self._path.with_name(DAMAGED_FILE + suffix))
                self._path.replace(self._path.with_name(DAMAGED_FILE))
        except Held as exc:
            raise RecordUnavailable(f"{self._path} is damaged, and {exc} is about to replace it", "end it") from exc
        except OSError as exc:
            raise RecordUnavailable(
                f"{self._path} is damaged and cannot be moved: {exc.strerror}", "delete it"
            ) from exc
        self._warn(
            f"the record of what was sent was damaged and is now {self._path.with_name(DAMAGED_FILE)}: episodes may be "
            "sent again, under the same ids"
        )

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as exc:
            raise self._failed(exc) from exc

    def _failed(self, exc: Exception) -> RecordUnavailable:
        return RecordUnavailable(
            f"{self._path}: {exc}",
            "free space, correct its permissions, or end the process that holds it; delete it if it is damaged: all "
            "is sent again",
        )


def _write(db: sqlite3.Connection, rows: Sequence[tuple[str, str, int, float, str]], end: str) -> None:
    db.execute("BEGIN IMMEDIATE")
    try:
        db.executemany(INSERT, rows)
        db.execute(end)
    except BaseException:
        if db.in_transaction:  # some errors end it themselves
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
        raise


def _code(exc: sqlite3.Error) -> int | None:
    code: int | None = getattr(exc, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _means_damage(exc: sqlite3.Error) -> bool:
    # Text that is not UTF-8 is an OperationalError of Python, without a code of sqlite.
    code = _code(exc)
    return code in DAMAGED or (code is None and isinstance(exc, sqlite3.OperationalError))


def _identity(path: Path) -> Identity:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
