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

CHUNK = 500
"""Ids in one statement; sqlite bounds their number."""


class ExportLog:
    """The episodes that a destination has confirmed, by trace id. Threads may share it.

    A destination is an exporter's name and address. If the process dies between the confirmation
    and the entry here, the episode is sent again; its ids are the same, so receivers keep one.

    Args:
        folder: `traces` of a run directory.

    Raises:
        DiskError: the file cannot be opened or written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS sent (destination TEXT, trace_id TEXT, step INTEGER, time REAL, "
                "content TEXT, PRIMARY KEY (destination, trace_id)) WITHOUT ROWID"
            )
            self._db.execute("CREATE INDEX IF NOT EXISTS by_content ON sent (destination, content)")
            self._db.commit()
        except sqlite3.Error as exc:
            raise self._failed(exc) from exc

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
