"""Tables of weave: lists of rows, each row and each table named by its digest."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any

from agentloop.files import read_json
from agentloop.viewer.received import Received
from agentloop.viewer.weave.queries import Columns, order
from agentloop.viewer.weave.values import (
    checked,
    digest_of_table,
    digest_of_value,
    dump,
    integer,
    listed,
    mapping,
    raw,
    text,
    texts,
)
from agentloop.web.refusals import Refusal

COLUMNS = Columns(plain={}, documents={}, rest="rows.val")


def create(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Store a table and its rows, once for each digest."""
    given = mapping(body, "table")
    project, rows = text(given, "project_id"), listed(given, "rows")
    digests = [digest_of_value(row) for row in rows]
    digest = checked(digest_of_table(digests), given)
    with received.writing() as connection:
        _add_rows(connection, project, digests, rows)
        _add_table(connection, project, digest, digests)
    return {"digest": digest, "row_digests": digests}


def create_from_digests(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Store a table whose rows are stored already."""
    project, digests = text(body, "project_id"), texts(body, "row_digests") or []
    digest = checked(digest_of_table(digests), body)
    with received.writing() as connection:
        _add_table(connection, project, digest, digests)
    return {"digest": digest}


def update(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Store a table that differs from another by rows added, inserted or taken away."""
    project = text(body, "project_id")
    with received.writing() as connection:
        digests = _digests(connection, project, text(body, "base_digest"))
        changed = []
        for item in listed(body, "updates"):
            change = item if isinstance(item, Mapping) else {}
            if isinstance(change.get("pop"), Mapping):
                changed.append(digests.pop(_index(change["pop"], len(digests) - 1)))
                continue
            row = change.get("append") or change.get("insert")
            if not isinstance(row, Mapping) or "row" not in row:
                raise Refusal(422, "each update needs append, insert or pop")
            at = _index(row, len(digests)) if "insert" in change else len(digests)
            digests.insert(at, digest_of_value(row["row"]))
            changed.append(digests[at])
            _add_rows(connection, project, [digests[at]], [row["row"]])
        digest = digest_of_table(digests)
        _add_table(connection, project, digest, digests)
    return {"digest": digest, "updated_row_digests": changed}


def query(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return rows of a table, in its order or sorted by fields."""
    project, chosen = text(body, "project_id"), body.get("filter") or {}
    wanted = texts(chosen, "row_digests") if isinstance(chosen, Mapping) else None
    limit, offset = integer(body, "limit"), integer(body, "offset", 0)
    ordered = order(body.get("sort_by") or None, COLUMNS, "place")
    with received.reading() as connection:
        digests = _digests(connection, project, text(body, "digest"))
        rows = connection.execute(
            "SELECT t.key AS place, rows.digest, rows.val FROM json_each(?) AS t "  # noqa: S608  # our names
            "JOIN rows ON rows.project = ? AND rows.digest = t.value "
            "WHERE ? IS NULL OR rows.digest IN (SELECT value FROM json_each(?)) "
            f"ORDER BY {ordered.text} LIMIT ? OFFSET ?",
            (
                dump(digests), project, None if wanted is None else 1, dump(wanted or []), *ordered.values,
                -1 if limit is None else limit, offset,
            ),
        ).fetchall()  # fmt: skip
    return {"rows": [{"digest": row["digest"], "val": raw(row["val"]), "original_index": row["place"]} for row in rows]}


def count(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Count the rows of a table."""
    with received.reading() as connection:
        return {"count": len(_digests(connection, text(body, "project_id"), text(body, "digest")))}


def count_several(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Count the rows of several tables."""
    project = text(body, "project_id")
    with received.reading() as connection:
        found = [(digest, len(_digests(connection, project, digest))) for digest in texts(body, "digests") or []]
    return {"tables": [{"digest": digest, "count": count} for digest, count in found]}


def _digests(connection: sqlite3.Connection, project: str, digest: str) -> list[str]:
    query = "SELECT row_digests FROM tables WHERE project = ? AND digest = ?"
    row = connection.execute(query, (project, digest)).fetchone()
    if row is None:
        raise Refusal(404, f"the table {digest} of {project} does not exist")
    digests: list[str] = read_json(row["row_digests"].encode())
    return digests


def _add_rows(connection: sqlite3.Connection, project: str, digests: list[str], rows: list[Any]) -> None:
    values = [(project, digest, dump(row)) for digest, row in zip(digests, rows, strict=True)]
    connection.executemany("INSERT OR IGNORE INTO rows VALUES (?, ?, ?)", values)


def _add_table(connection: sqlite3.Connection, project: str, digest: str, digests: list[str]) -> None:
    connection.execute("INSERT OR IGNORE INTO tables VALUES (?, ?, ?)", (project, digest, dump(digests)))


def _index(body: Mapping[str, Any], most: int) -> int:
    index = integer(body, "index")
    if index is None or index > most:
        raise Refusal(422, f"index must be an integer from 0 to {most}")
    return index
