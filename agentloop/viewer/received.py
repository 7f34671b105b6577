"""What other programs sent: calls, objects, tables and feedback of weave, spans of OpenTelemetry.

One sqlite database in the data folder, in write-ahead mode: readers see a consistent state while
others write. Times are integers, microseconds since 1970. Files lie beside it, named by digest.
"""

from __future__ import annotations

import queue
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from agentloop.errors import DiskError
from agentloop.files import disk_error, write_atomic
from agentloop.web.refusals import Refusal

DATABASE = "received.sqlite"
FILES = "files"

LAYOUT = 2
"""Number of the layout of the tables; a database with a higher one was made by a newer version."""

BUSY_S = 30.0
"""How long a connection waits while another process writes."""

STEP = "json_extract(attributes, '$.\"step\"')"
"""The attribute that readers of a run filter by; it has an index of its own."""

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS calls (
    project TEXT NOT NULL, id TEXT NOT NULL, trace_id TEXT, parent_id TEXT, op_name TEXT, display_name TEXT,
    started_at INTEGER, ended_at INTEGER, exception TEXT, thread_id TEXT, turn_id TEXT,
    wb_user_id TEXT, wb_run_id TEXT, wb_run_step INTEGER, wb_run_step_end INTEGER,
    attributes TEXT CHECK (attributes IS NULL OR json_valid(attributes)),
    inputs TEXT CHECK (inputs IS NULL OR json_valid(inputs)),
    output TEXT CHECK (output IS NULL OR json_valid(output)),
    summary TEXT CHECK (summary IS NULL OR json_valid(summary)),
    UNIQUE (project, id));
CREATE INDEX IF NOT EXISTS calls_by_start ON calls (project, started_at, id);
CREATE INDEX IF NOT EXISTS calls_by_id ON calls (id);
CREATE INDEX IF NOT EXISTS calls_by_trace ON calls (project, trace_id);
CREATE INDEX IF NOT EXISTS calls_by_parent ON calls (project, parent_id);
CREATE INDEX IF NOT EXISTS calls_by_step ON calls ({STEP});
CREATE INDEX IF NOT EXISTS calls_failed ON calls (project, trace_id) WHERE exception IS NOT NULL;
CREATE TABLE IF NOT EXISTS objects (
    project TEXT NOT NULL, object_id TEXT NOT NULL, digest TEXT NOT NULL, version_index INTEGER NOT NULL,
    created_at INTEGER NOT NULL, kind TEXT NOT NULL, base_object_class TEXT, leaf_object_class TEXT,
    val TEXT NOT NULL, deleted_at INTEGER,
    UNIQUE (project, object_id, digest));
CREATE TABLE IF NOT EXISTS rows (
    project TEXT NOT NULL, digest TEXT NOT NULL, val TEXT NOT NULL CHECK (json_valid(val)), UNIQUE (project, digest));
CREATE TABLE IF NOT EXISTS tables (
    project TEXT NOT NULL, digest TEXT NOT NULL, row_digests TEXT NOT NULL, UNIQUE (project, digest));
CREATE TABLE IF NOT EXISTS feedback (
    project TEXT NOT NULL, id TEXT NOT NULL, weave_ref TEXT NOT NULL, feedback_type TEXT NOT NULL,
    created_at INTEGER NOT NULL, creator TEXT,
    payload TEXT NOT NULL CHECK (json_valid(payload)), more TEXT NOT NULL CHECK (json_valid(more)),
    UNIQUE (project, id));
CREATE INDEX IF NOT EXISTS feedback_by_ref ON feedback (project, weave_ref);
CREATE TABLE IF NOT EXISTS spans (
    trace_id TEXT NOT NULL, span_id TEXT NOT NULL, parent_id TEXT, service TEXT NOT NULL, name TEXT NOT NULL,
    kind TEXT NOT NULL, started_at INTEGER NOT NULL, ended_at INTEGER, status TEXT NOT NULL, message TEXT,
    attributes TEXT NOT NULL, resource TEXT NOT NULL, events TEXT NOT NULL,
    UNIQUE (trace_id, span_id));
CREATE INDEX IF NOT EXISTS spans_by_start ON spans (started_at, span_id);
CREATE INDEX IF NOT EXISTS spans_failed ON spans (trace_id) WHERE status = 'error';
"""

UPGRADE = f"""
ALTER TABLE calls RENAME TO calls_1;
DROP INDEX IF EXISTS calls_by_start;
DROP INDEX IF EXISTS calls_by_id;
DROP INDEX IF EXISTS calls_by_trace;
DROP INDEX IF EXISTS calls_by_parent;
DROP INDEX IF EXISTS calls_by_step;
{SCHEMA}
INSERT INTO calls SELECT * FROM calls_1;
DROP TABLE calls_1;
"""  # noqa: S608  # our names
"""From layout 1, whose checks of calls failed for a call without an end in sqlite before 3.41."""

Place = tuple[int, int]
"""Device and number of a file: another one if the file was deleted and made again."""


class Received:
    """The database and the files of one data folder.

    Args:
        folder: made when the first thing arrives; before that, everything reads as empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / DATABASE
        self._idle: queue.SimpleQueue[tuple[sqlite3.Connection, Place | None]] = queue.SimpleQueue()
        self._writer: sqlite3.Connection | None = None
        self._written: Place | None = None
        self._lock = threading.Lock()
        self.changes = 0
        """Number of writes by this process: shows a reader that there is something new."""

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection that sees one state of the database for the length of the block.

        Raises:
            Refusal: the database cannot be read, or not in the way that the block asks for.
        """
        place = self._place()
        connection = None if place is None else self._lent(place)
        if connection is None or place is None:
            with closing(_connect(":memory:")) as empty:
                empty.executescript(SCHEMA)
                try:
                    yield empty
                except sqlite3.DatabaseError as exc:
                    raise self._refusal(exc) from exc
            return
        try:
            connection.execute("BEGIN")
            yield connection
        except sqlite3.DatabaseError as exc:
            raise self._refusal(exc) from exc
        finally:
            with suppress(sqlite3.Error):
                connection.rollback()
            self._idle.put((connection, place))

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection that writes, within one transaction.

        Raises:
            DiskError: the disk is full, read-only or broken.
            Refusal: a value breaks a rule of the tables, or the database cannot be used.
        """
        with self._lock:
            try:
                connection = self._writing()
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.commit()
                    self.changes += 1
                except BaseException:
                    with suppress(sqlite3.Error):
                        connection.rollback()
                    raise
            except sqlite3.IntegrityError as exc:
                raise _broken_rule(exc) from exc
            except sqlite3.DatabaseError as exc:
                if isinstance(exc, sqlite3.OperationalError) and _code(exc) != sqlite3.SQLITE_ERROR:
                    raise DiskError(
                        f"{self._path} could not be written: {exc}", "check that disk, then repeat"
                    ) from exc
                raise self._refusal(exc) from exc
            except OSError as exc:
                raise disk_error(exc, self._path) or exc from exc

    def file(self, digest: str) -> Path:
        """Return the path of a stored file, whether or not it exists."""
        return self.folder / FILES / digest[:2] / digest

    def add_file(self, digest: str, content: bytes) -> None:
        """Store a file once."""
        path = self.file(digest)
        if not path.is_file():
            write_atomic(path, content, durable=False)

    def close(self) -> None:
        """Close all connections that are not in use."""
        with suppress(queue.Empty):
            while True:
                self._idle.get_nowait()[0].close()
        with self._lock:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def _place(self) -> Place | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_dev, stat.st_ino

    def _lent(self, place: Place) -> sqlite3.Connection | None:
        """Return a connection to the file that is there now, not to one that was deleted; None if
        its tables are still being made."""
        with suppress(queue.Empty):
            while True:
                connection, opened = self._idle.get_nowait()
                if opened == place:
                    return connection
                connection.close()
        connection, layout = self._open()
        if layout:
            return connection
        connection.close()
        return None

    def _writing(self) -> sqlite3.Connection:
        if self._writer is not None and self._place() != self._written:
            self._writer.close()
            self._writer = None
        if self._writer is None:
            self._writer = self._made()
            self._written = self._place()
        return self._writer

    def _made(self) -> sqlite3.Connection:
        self.folder.mkdir(parents=True, exist_ok=True)
        connection, _ = self._open()
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        try:
            (layout,) = connection.execute("PRAGMA user_version").fetchone()
            for statement in (UPGRADE if layout == 1 else SCHEMA).split(";\n"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {LAYOUT}")
            connection.commit()
        except BaseException:
            connection.close()
            raise
        return connection

    def _refusal(self, exc: sqlite3.DatabaseError) -> Refusal:
        code = _code(exc)
        if code in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_RANGE):
            return Refusal(422, f"sqlite cannot answer this request: {exc}", "ask for less at once")
        if code == sqlite3.SQLITE_BUSY:
            return Refusal(503, f"{self._path} is in use: {exc}", "repeat the request")
        return Refusal(500, f"{self._path} cannot be read: {exc}", "move the file away, or give another --data")

    def _open(self) -> tuple[sqlite3.Connection, int]:
        """Return a connection and the number of the layout, 0 before there are tables."""
        try:
            connection = _connect(self._path)
            (layout,) = connection.execute("PRAGMA user_version").fetchone()
        except sqlite3.DatabaseError as exc:
            raise Refusal(
                500, f"{self._path} cannot be read: {exc}", "move the file away, or give another --data"
            ) from exc
        if layout > LAYOUT:
            connection.close()
            raise Refusal(
                500, f"{self._path} was made by a newer version of agentloop", "upgrade, or give another --data"
            )
        return connection, layout


def _code(exc: sqlite3.Error) -> int:
    """Return the primary code of an error of sqlite."""
    return getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_INTERNAL) & 0xFF


def _broken_rule(exc: sqlite3.IntegrityError) -> Refusal:
    """Return what to answer for a value that breaks a rule of the tables; it names the rule."""
    if (match := re.search(r"json_valid\((\w+)\)", str(exc))) is not None:
        fix = f"send {match[1]} with fewer lists and objects inside one another"
        return Refusal(422, f"{match[1]} cannot be stored: sqlite does not read it as JSON ({exc})", fix)
    return Refusal(422, f"a value cannot be stored: {exc}", "correct the field that is named, then send it again")


def _connect(path: Path | str) -> sqlite3.Connection:
    # Connections are lent to one thread after another.
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.create_function("as_number", 1, _number, deterministic=True)
    connection.create_function("as_text", 1, _text, deterministic=True)
    return connection


def _number(value: object) -> float | int | None:
    """Return a value as a number for a comparison with one; None where it names none."""
    if isinstance(value, int | float):
        return value
    if isinstance(value, str) and len(value) <= 64:
        with suppress(ValueError):
            return float(value)
    return None


def _text(value: object) -> str | None:
    """Return a value as a text for a comparison with one."""
    return value if isinstance(value, str) or value is None else str(value)
