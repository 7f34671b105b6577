"""The record of what was sent where, `traces/exports.sqlite`: each episode goes out once."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from agentloop.errors import DiskError

FILE = "exports.sqlite"

BUSY_TIMEOUT_S = 10.0
"""How long to wait for another process that writes, such as `agentloop trace push` beside a run."""

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
"""Errors at the opening that mean that the file does not hold what it should."""

CHUNK = 500
"""Ids in one statement; sqlite bounds their number."""


class ExportLog:
    """The episodes that a destination has confirmed, by trace id. Threads may share it.

    A destination is an exporter's name and address. If the process dies between the confirmation
    and the entry here, the episode is sent again; its ids are the same, so receivers keep one.

    Args:
        folder: `traces` of a run directory.

    Attributes:
        damaged: where a damaged file was moved to; None if it was not.

    Raises:
        DiskError: the file cannot be opened or written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._lock = threading.Lock()
        self.damaged: Path | None = None
        folder.mkdir(parents=True, exist_ok=True)
        with self._named():
            try:
                self._db = self._open()
            except sqlite3.Error as exc:
                if getattr(exc, "sqlite_errorcode", None) not in DAMAGED:
                    raise
                self.damaged = self._move_aside()
                self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
        try:
            db.execute(
                "CREATE TABLE IF NOT EXISTS sent (destination TEXT, trace_id TEXT, step INTEGER, time REAL, "
                "content TEXT, PRIMARY KEY (destination, trace_id)) WITHOUT ROWID"
            )
            db.execute("CREATE INDEX IF NOT EXISTS by_content ON sent (destination, content)")
            db.commit()
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _move_aside(self) -> Path:
        """Rename the file, and its journal, which would be applied to the next one."""
        moved = self._path.with_name(FILE + ".damaged")
        try:
            for suffix in ("-journal", "-wal", "-shm"):
                journal = self._path.with_name(FILE + suffix)
                if journal.exists():
                    journal.replace(self._path.with_name(moved.name + suffix))
            self._path.replace(moved)
        except OSError as exc:
            raise DiskError(f"{self._path} is damaged and cannot be moved: {exc.strerror}", "delete it") from exc
        return moved

    def sent(self, destination: str, trace_ids: Sequence[str]) -> set[str]:
        """Return those of the ids that the destination has."""
        return self._found(destination, "trace_id", trace_ids)

    def contents(self, destination: str, contents: Sequence[str]) -> set[str]:
        """Return those of the contents (`TracedEpisode.content`) that the destination has, under
        whatever trace id: a resumed run samples the steps after its checkpoint again."""
        return self._found(destination, "content", contents)

    def _found(self, destination: str, column: str, values: Sequence[str]) -> set[str]:
        found: set[str] = set()
        with self._lock, self._named():
            for begin in range(0, len(values), CHUNK):
                some = values[begin : begin + CHUNK]
                marks = ",".join("?" * len(some))
                query = f"SELECT {column} FROM sent WHERE destination = ? AND {column} IN ({marks})"  # noqa: S608
                found |= {row[0] for row in self._db.execute(query, (destination, *some))}
        return found

    def mark(self, destination: str, episodes: Iterable[tuple[str, int, str]]) -> None:
        """Note confirmed episodes: (trace id, step, content)."""
        now = time.time()
        rows = [(destination, trace_id, step, now, content) for trace_id, step, content in episodes]
        if not rows:
            return
        with self._lock, self._named(), self._db:
            self._db.executemany("INSERT OR REPLACE INTO sent VALUES (?, ?, ?, ?, ?)", rows)

    def counts(self) -> dict[str, int]:
        """Return the number of episodes by destination."""
        with self._lock, self._named():
            return dict(self._db.execute("SELECT destination, count(*) FROM sent GROUP BY destination ORDER BY 1"))

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise self._failed(exc) from exc

    def _failed(self, exc: sqlite3.Error) -> DiskError:
        return DiskError(
            f"{self._path}: {exc}",
            "free space or correct its permissions; delete it if it is damaged: all is sent again",
        )
