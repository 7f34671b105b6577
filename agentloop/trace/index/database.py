"""The sqlite file of an index: where it may lie, its connections, and when it is damaged."""

from __future__ import annotations

import queue
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from agentloop.trace.index.schema import INDEX_FORMAT, STATEMENTS

NAME = "index.sqlite"
APPLICATION = 0x616C7472
"""Marks the file as ours (`PRAGMA application_id`)."""

WAIT_S = 20.0
"""How long a connection waits for another one's transaction."""

KEPT_CONNECTIONS = 4
CACHE_KIB = 8192
"""Page cache of a connection."""

WAL_BYTES = 16 << 20

_UNAVAILABLE = ("locked", "busy", "readonly", "unable to open", "disk is full", "disk I/O", "no space")
_DAMAGED = ("malformed", "no such table", "no such column")
"""Parts of the messages of operational errors; one that has none of them is a bug of ours."""


class Damaged(Exception):
    """The file is not a database, not ours, of another version, or inconsistent."""


class Unavailable(Exception):
    """The file cannot be opened or written: read-only, locked, or the disk is full."""


@contextmanager
def sqlite_errors() -> Iterator[None]:
    """Turn errors of sqlite within the block into `Damaged` or `Unavailable`."""
    try:
        yield
    except sqlite3.DatabaseError as exc:
        if isinstance(exc, sqlite3.OperationalError):
            if any(part in str(exc) for part in _UNAVAILABLE):
                raise Unavailable(str(exc)) from exc
            if not any(part in str(exc) for part in _DAMAGED):
                raise
        elif not isinstance(exc, sqlite3.IntegrityError) and type(exc) is not sqlite3.DatabaseError:
            raise
        raise Damaged(str(exc)) from exc


class Database:
    """One sqlite file. Connections may be used in any thread, by one at a time.

    Args:
        path: of the file; it is made if it does not exist.

    Raises:
        Damaged, Unavailable: as the classes say.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._idle: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue(KEPT_CONNECTIONS)
        with sqlite_errors():
            connection = self._connect()
            try:
                _prepare(connection)
            except BaseException:
                connection.close()
                raise
        self._idle.put(connection)
        stat = path.stat()
        self._file = stat.st_dev, stat.st_ino

    @property
    def replaced(self) -> bool:
        """Whether the path is no longer the file that was opened: another process rebuilt it."""
        try:
            stat = self.path.stat()
        except OSError:
            return True
        return (stat.st_dev, stat.st_ino) != self._file

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection; errors of sqlite within the block become ours."""
        try:
            connection = self._idle.get_nowait()
        except queue.Empty:
            with sqlite_errors():
                connection = self._connect()
        try:
            with sqlite_errors():
                yield connection
        except BaseException:
            connection.close()  # it may be in a transaction, which this rolls back
            raise
        try:
            self._idle.put_nowait(connection)
        except queue.Full:
            connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection in a transaction that writes; it is rolled back if the block raises."""
        with self.connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")

    def close(self) -> None:
        """Close the idle connections."""
        with suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("PRAGMA trusted_schema = OFF")
        return connection


def remove(path: Path) -> None:
    """Remove an index with its side files."""
    for ending in ("", "-wal", "-shm", "-journal"):
        with suppress(OSError):
            path.with_name(path.name + ending).unlink(missing_ok=True)


def temporary_copy(original: Path | None) -> tempfile.TemporaryDirectory[str]:
    """Make a folder for an index that cannot lie beside the traces. If one is there that can only
    be read, copy it."""
    folder = tempfile.TemporaryDirectory(prefix="agentloop-index-")
    path = Path(folder.name) / NAME
    if original is not None and original.is_file():
        try:
            with (
                closing(sqlite3.connect(f"{original.absolute().as_uri()}?mode=ro", uri=True)) as source,
                closing(sqlite3.connect(path)) as target,
            ):
                source.backup(target)
        except sqlite3.Error:
            remove(path)
    return folder


def _prepare(connection: sqlite3.Connection) -> None:
    """Make the tables of a new file.

    Raises:
        Damaged: it has other tables.
    """
    connection.execute("PRAGMA journal_mode = WAL")
    if _marks(connection) == (APPLICATION, INDEX_FORMAT):
        return
    connection.execute("BEGIN IMMEDIATE")
    if _marks(connection) != (APPLICATION, INDEX_FORMAT):  # another process may have been faster
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise Damaged("it has the tables of another version")
        for statement in STATEMENTS:
            connection.execute(statement)
        connection.execute("INSERT INTO state VALUES ('generation', ?)", (time.time_ns(),))
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {INDEX_FORMAT}")
    connection.execute("COMMIT")


def _marks(connection: sqlite3.Connection) -> tuple[int, int]:
    return (
        connection.execute("PRAGMA application_id").fetchone()[0],
        connection.execute("PRAGMA user_version").fetchone()[0],
    )
