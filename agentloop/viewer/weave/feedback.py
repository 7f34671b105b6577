"""Feedback of weave: reactions, notes and scores of calls and objects."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Mapping
from typing import Any

from agentloop.files import read_json
from agentloop.viewer.received import Received
from agentloop.viewer.weave.queries import Columns, Sql, condition, order
from agentloop.viewer.weave.values import dump, integer, iso, listed, mapping, now, optional_text, text, texts
from agentloop.web.refusals import Refusal

USER = "local"
"""The only user of this server, as weave's client sees it."""

COLUMNS = Columns(
    plain={
        "id": "id", "project_id": "project", "weave_ref": "weave_ref", "feedback_type": "feedback_type",
        "creator": "creator", "created_at": "created_at", "wb_user_id": f"'{USER}'",
        **{
            name: f"json_extract(more, '$.{name}')"
            for name in ("annotation_ref", "runnable_ref", "call_ref", "trigger_ref", "queue_id")
        },
    },
    documents={"payload": "payload", "more": "more"},
    times=frozenset({"created_at"}),
)  # fmt: skip

_OWN = ("id", "project_id", "weave_ref", "feedback_type", "creator", "payload", "created_at", "wb_user_id")


def create(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Store feedback, once for each id."""
    with received.writing() as connection:
        return _store(connection, body)


def create_batch(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Store several."""
    with received.writing() as connection:
        items = listed(body, "batch")
        if not all(isinstance(item, dict) for item in items):
            raise Refusal(422, "each item of batch must be an object")
        return {"res": [_store(connection, item) for item in items]}


def replace(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Store feedback in the place of another."""
    with received.writing() as connection:
        gone = (text(body, "project_id"), text(body, "feedback_id"))
        connection.execute("DELETE FROM feedback WHERE project = ? AND id = ?", gone)
        return _store(connection, {key: value for key, value in body.items() if key != "feedback_id"})


def purge(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Delete the feedback that a query names."""
    where = _where(body)
    if body.get("query") is None:
        raise Refusal(422, "query is missing: it names what to delete")
    with received.writing() as connection:
        connection.execute(f"DELETE FROM feedback WHERE {where.text}", where.values)  # noqa: S608  # our names
    return {}


def query(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return feedback by query, in pages."""
    where = _where(body)
    ordered = order(body.get("sort_by"), COLUMNS, "created_at, id")
    limit, offset, fields = integer(body, "limit"), integer(body, "offset", 0), texts(body, "fields")
    with received.reading() as connection:
        (total,) = connection.execute(
            f"SELECT COUNT(*) FROM feedback WHERE {where.text}",  # noqa: S608  # our names
            where.values,
        ).fetchone()
        rows = connection.execute(
            f"SELECT * FROM feedback WHERE {where.text} "  # noqa: S608  # our names
            f"ORDER BY {ordered.text} LIMIT ? OFFSET ?",
            (*where.values, *ordered.values, -1 if limit is None else limit, offset),
        ).fetchall()
    found = [_shown(row) for row in rows]
    if fields is not None:
        found = [{name: item.get(name) for name in fields} for item in found]
    return {"result": found, "total_count": total}


def feedback_of(connection: sqlite3.Connection, project: str, call: str) -> list[dict[str, Any]]:
    """Return the feedback of a call, oldest first."""
    rows = connection.execute(
        "SELECT * FROM feedback WHERE project = ? AND weave_ref = ? ORDER BY created_at, id",
        (project, f"weave:///{project}/call/{call}"),
    )
    return [_shown(row) for row in rows]


def _where(body: Mapping[str, Any]) -> Sql:
    project = Sql("project = ?", (text(body, "project_id"),))
    if body.get("query") is None:
        return project
    asked = condition(body["query"], COLUMNS)
    return Sql(f"{project.text} AND {asked.text}", project.values + asked.values)


def _store(connection: sqlite3.Connection, item: Mapping[str, Any]) -> dict[str, Any]:
    given = item.get("id") or str(uuid.uuid4())
    if not isinstance(given, str):
        raise Refusal(422, "id must be a text")
    more = {key: value for key, value in item.items() if key not in _OWN and value is not None}
    created = now()
    payload = mapping(item, "payload")
    connection.execute(
        "INSERT OR REPLACE INTO feedback VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            text(item, "project_id"), given, text(item, "weave_ref"), text(item, "feedback_type"), created,
            optional_text(item, "creator"), dump(payload), dump(more),
        ),
    )  # fmt: skip
    return {"id": given, "created_at": iso(created), "wb_user_id": USER, "payload": payload}


def _shown(row: sqlite3.Row) -> dict[str, Any]:
    return {
        **read_json(row["more"].encode()),
        "id": row["id"],
        "project_id": row["project"],
        "weave_ref": row["weave_ref"],
        "feedback_type": row["feedback_type"],
        "creator": row["creator"],
        "wb_user_id": USER,
        "created_at": iso(row["created_at"]),
        "payload": read_json(row["payload"].encode()),
    }
