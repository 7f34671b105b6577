"""Read and write the tables of an index, over a connection."""

from __future__ import annotations

import sqlite3
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import orjson

from agentloop.trace.index.query import EpisodeFilter, Sort
from agentloop.trace.index.rows import EpisodeRow
from agentloop.trace.index.schema import EPISODE_COLUMNS, FACETS, SEARCHED, TEXT_COLUMNS
from agentloop.trace.record import RecordKey
from agentloop.trace.store import TraceFile
from agentloop.trace.store.encode import integer_cell

BATCH = 256
"""Episodes inserted at a time."""

FACET_VALUES = 50
"""Values of a facet, the most frequent first."""

FAILURE_KEYS = 5
"""Episodes that a cause names."""

MOST_CAUSES = 200

Signature = tuple[int, int]
"""Size and time of change of a trace file."""

_CLASS_COLUMNS = [EPISODE_COLUMNS.index(name) - 2 for name in FACETS]
"""Where the columns of a class are in `EpisodeRow.columns`, which lacks `file` and `class`."""

_SHOWN = tuple(name for name in EPISODE_COLUMNS if name not in ("file", "class")) + TEXT_COLUMNS[1:]
_SELECT = "SELECT e.id, {} FROM episodes e JOIN texts t ON t.id = e.id WHERE e.id IN ({})"


@dataclass(frozen=True, slots=True)
class Failure:
    """Failed or rejected episodes of one cause: errors that differ only in numbers."""

    status: str
    cause: str
    error: str
    count: int
    first_step: int
    last_step: int
    tasks: int
    keys: list[str]


def generation(connection: sqlite3.Connection) -> int:
    """Return a number that changes with the index."""
    return int(connection.execute("SELECT value FROM state WHERE name = 'generation'").fetchone()[0])


def count_change(connection: sqlite3.Connection) -> None:
    """Record that the index changed."""
    connection.execute("UPDATE state SET value = value + 1 WHERE name = 'generation'")


def indexed(connection: sqlite3.Connection, name: str | None = None) -> dict[str, Signature]:
    """Return the files that the index holds, or the one of a name."""
    condition, values = ("", ()) if name is None else (" WHERE name = ?", (name,))
    return {
        name: (size, mtime)
        for name, size, mtime in connection.execute(f"SELECT name, size, mtime_ns FROM files{condition}", values)  # noqa: S608
    }


def add_file(connection: sqlite3.Connection, file: TraceFile, name: str, signature: Signature) -> int:
    """Add a file without episodes; return its number."""
    done = connection.execute(
        "INSERT INTO files (name, step, split, size, mtime_ns, episodes, failed) VALUES (?, ?, ?, ?, ?, 0, 0)",
        (name, file.step, file.split, *signature),
    )
    assert done.lastrowid is not None
    return done.lastrowid


def remove_file(connection: sqlite3.Connection, name: str) -> None:
    """Remove a file with its episodes, if the index holds it. Its words stay behind."""
    found = connection.execute("SELECT id FROM files WHERE name = ?", (name,)).fetchone()
    if found is None:
        return
    connection.execute("DELETE FROM texts WHERE id IN (SELECT id FROM episodes WHERE file = ?)", found)
    connection.execute("DELETE FROM episodes WHERE file = ?", found)
    connection.execute("DELETE FROM files WHERE id = ?", found)


def add_episodes(connection: sqlite3.Connection, file: int, rows: Iterable[EpisodeRow]) -> None:
    """Add the episodes of a file."""
    last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'episodes'").fetchone()
    number = last[0] if last is not None else 0
    classes = {tuple(values): number for number, *values in connection.execute("SELECT * FROM classes")}
    waiting = iter(rows)
    while batch := list(islice(waiting, BATCH)):
        ids = range(number + 1, number + 1 + len(batch))
        pairs = list(zip(ids, batch, strict=True))
        _insert(
            connection,
            "episodes",
            ("id", *EPISODE_COLUMNS),
            [(i, file, _class_of(connection, row, classes), *row.columns) for i, row in pairs],
        )
        _insert(connection, "texts", TEXT_COLUMNS, [(i, *row.texts) for i, row in pairs])
        _insert(connection, "words", ("rowid", *SEARCHED), [(i, *row.words) for i, row in pairs])
        number += len(batch)
    connection.execute(
        "UPDATE files SET episodes = (SELECT count(*) FROM episodes WHERE file = :file),"
        " failed = (SELECT count(*) FROM episodes WHERE file = :file AND status != 'ok') WHERE id = :file",
        {"file": file},
    )


def rows_of(connection: sqlite3.Connection, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Return the episodes of some ids, in their order."""
    if not ids:
        return []
    marks = ", ".join("?" * len(ids))
    found = {}
    for number, *values in connection.execute(_SELECT.format(", ".join(_SHOWN), marks), tuple(ids)):
        row = dict(zip(_SHOWN, values, strict=True))
        row["trajectories"] = row.pop("parts")
        row["parts"] = orjson.loads(row.pop("reward_parts"))
        key = RecordKey(row["split"], row["step"], row["group_id"], row["sample_index"], row["part"])
        found[number] = {"key": str(key), **row}
    return [found[number] for number in ids if number in found]


def id_of(connection: sqlite3.Connection, key: RecordKey) -> int | None:
    """Return the episode that a key belongs to; None if there is none."""
    if not integer_cell(key.step)[1] or not integer_cell(key.sample_index)[1]:
        return None
    found = connection.execute(
        "SELECT id FROM episodes WHERE step = ? AND split = ? AND group_id = ? AND sample_index = ?",
        (key.step, key.split, key.group_id, key.sample_index),
    ).fetchone()
    return None if found is None else int(found[0])


def find(connection: sqlite3.Connection, wanted: EpisodeFilter, sort: Sort) -> tuple[array[int], dict[int, int] | None]:
    """Return the ids that a filter finds, sorted, and how many of them are of each class; None: all
    episodes are wanted, and their classes were not looked at."""
    condition, values = wanted.where()
    order = sort.order()
    if not values:
        rows = connection.execute(f"SELECT id FROM episodes ORDER BY {order}")  # noqa: S608
        return array("q", [row[0] for row in rows]), None
    found = connection.execute(f"SELECT id, class FROM episodes WHERE {condition} ORDER BY {order}", values).fetchall()  # noqa: S608
    return array("q", [row[0] for row in found]), Counter(row[1] for row in found)


def count_classes(connection: sqlite3.Connection, wanted: EpisodeFilter) -> dict[int, int]:
    """Count the episodes of each class that a filter finds."""
    condition, values = wanted.where()
    return dict(
        connection.execute(f"SELECT class, count(*) FROM episodes WHERE {condition} GROUP BY class", values).fetchall()  # noqa: S608
    )


def facets(
    connection: sqlite3.Connection, wanted: EpisodeFilter, count: Callable[[EpisodeFilter], dict[int, int]]
) -> dict[str, dict[str, int]]:
    """Count the values of each facet among the episodes that a filter finds.

    A facet that the filter chooses values of is counted without that choice: a reader sees what
    another choice would find.

    Args:
        count: `count_classes`, or what is known of it.
    """
    names = {number: values for number, *values in connection.execute("SELECT * FROM classes")}
    chosen = {column for column, _ in wanted.choices}
    found: dict[str, dict[str, int]] = {}
    for place, facet in enumerate(FACETS):
        others = tuple(choice for choice in wanted.choices if choice[0] != facet)
        counts = Counter[str]()
        for number, episodes in count(replace(wanted, choices=others) if facet in chosen else wanted).items():
            counts[names[number][place]] += episodes
        found[facet] = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:FACET_VALUES])
    return found


def failures(connection: sqlite3.Connection) -> list[Failure]:
    """Return failed and rejected episodes by cause, the most frequent first."""
    groups = connection.execute(
        "SELECT status, cause, count(*), min(step), max(step), count(DISTINCT task_id) FROM episodes"
        " WHERE status != 'ok' GROUP BY status, cause ORDER BY count(*) DESC, cause LIMIT ?",
        (MOST_CAUSES,),
    ).fetchall()
    found = []
    for status, cause, count, first, last, tasks in groups:
        ids = connection.execute(
            "SELECT id FROM episodes WHERE status = ? AND cause = ? AND status != 'ok' ORDER BY step DESC, id LIMIT ?",
            (status, cause, FAILURE_KEYS),
        )
        rows = rows_of(connection, [row[0] for row in ids])
        error = next((row["error"] for row in rows if row["error"]), cause)
        found.append(Failure(status, cause, error, count, first, last, tasks, [row["key"] for row in rows]))
    return found


def _class_of(connection: sqlite3.Connection, row: EpisodeRow, classes: dict[tuple[Any, ...], int]) -> int:
    """Return the class of an episode; add it if it is new."""
    values = tuple(row.columns[i] for i in _CLASS_COLUMNS)
    if values not in classes:
        classes[values] = len(classes) + 1
        _insert(connection, "classes", ("id", *FACETS), [(classes[values], *values)])
    return classes[values]


def _insert(connection: sqlite3.Connection, table: str, columns: Sequence[str], rows: list[tuple[Any, ...]]) -> None:
    marks = ", ".join("?" * len(columns))
    connection.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", rows)  # noqa: S608
