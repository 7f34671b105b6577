"""Write calls of weave: when they start, when they end, or complete.

A call is named by its project and its id: sent twice, it is stored once. An end may arrive before
its start; the call appears once its start is known.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Mapping
from typing import Any

from agentloop.viewer.received import Received
from agentloop.viewer.weave.values import (
    dump,
    integer,
    listed,
    mapping,
    optional_text,
    text,
    texts,
    time_of,
)
from agentloop.web.refusals import Refusal

TEXTS = ("trace_id", "parent_id", "op_name", "display_name", "thread_id", "turn_id", "wb_run_id", "exception")


def complete(received: Received, project: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Store calls that have ended: start and end in one."""
    calls = [{**_start(call), **_end(call), "project": project} for call in _objects(listed(body, "batch"), "batch")]
    with received.writing() as connection:
        for call in calls:
            _store(connection, call)
    return {}


def start(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Store the start of a call."""
    with received.writing() as connection:
        return _begin(connection, body)


def end(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Store the end of a call."""
    with received.writing() as connection:
        return _finish(connection, body)


def upsert_batch(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Store starts and ends in the order in which they were sent."""
    items = _objects(listed(body, "batch"), "batch")
    with received.writing() as connection:
        return {"res": [_either(connection, mapping(item, "req")) for item in items]}


def update(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Rename a call."""
    project, call, name = text(body, "project_id"), text(body, "call_id"), optional_text(body, "display_name")
    with received.writing() as connection:
        connection.execute("UPDATE calls SET display_name = ? WHERE project = ? AND id = ?", (name, project, call))
    return {}


def delete(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Delete calls and all calls below them."""
    project, ids = text(body, "project_id"), texts(body, "call_ids") or []
    with received.writing() as connection:
        connection.execute(
            "WITH RECURSIVE gone(id) AS (SELECT value FROM json_each(?2) UNION SELECT calls.id FROM calls JOIN gone "
            "ON calls.project = ?1 AND calls.parent_id = gone.id) "
            "DELETE FROM calls WHERE project = ?1 AND id IN (SELECT id FROM gone)",
            (project, dump(ids)),
        )
        (deleted,) = connection.execute("SELECT changes()").fetchone()
        return {"num_deleted": deleted}


def _either(connection: sqlite3.Connection, request: Mapping[str, Any]) -> dict[str, Any]:
    if "start" in request:
        return _begin(connection, request)
    if "end" in request:
        return _finish(connection, request)
    raise Refusal(422, "each item of a batch needs a start or an end")


def _begin(connection: sqlite3.Connection, body: Mapping[str, Any]) -> dict[str, Any]:
    given = mapping(body, "start")
    given.setdefault("id", None)
    given["id"] = given["id"] or str(uuid.uuid4())
    given["trace_id"] = given.get("trace_id") or given["id"]
    _store(connection, {**_start(given), "project": text(given, "project_id")})
    return {"id": given["id"], "trace_id": given["trace_id"]}


def _finish(connection: sqlite3.Connection, body: Mapping[str, Any]) -> dict[str, Any]:
    given = mapping(body, "end")
    _store(connection, {**_end(given), "id": text(given, "id"), "project": text(given, "project_id")})
    return {}


def _start(call: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": text(call, "id"),
        "trace_id": text(call, "trace_id"),
        "op_name": text(call, "op_name"),
        "started_at": time_of(call.get("started_at"), "started_at"),
        **{name: optional_text(call, name) for name in TEXTS if name not in ("trace_id", "op_name", "exception")},
        "wb_run_step": integer(call, "wb_run_step"),
        "attributes": dump(mapping(call, "attributes")),
        "inputs": dump(mapping(call, "inputs")),
    }


def _end(call: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "ended_at": time_of(call.get("ended_at"), "ended_at"),
        "exception": optional_text(call, "exception"),
        "output": dump(call.get("output")),
        "summary": dump(mapping(call, "summary")),
        "wb_run_step_end": integer(call, "wb_run_step_end"),
    }


def _store(connection: sqlite3.Connection, call: Mapping[str, Any]) -> None:
    names = list(call)
    changes = ", ".join(f"{name} = excluded.{name}" for name in names if name not in ("project", "id"))
    connection.execute(
        f"INSERT INTO calls ({', '.join(names)}) VALUES ({', '.join('?' * len(names))}) "  # noqa: S608  # our names
        f"ON CONFLICT (project, id) DO UPDATE SET {changes}",
        list(call.values()),
    )


def _objects(items: list[Any], key: str) -> list[dict[str, Any]]:
    if not all(isinstance(item, dict) for item in items):
        raise Refusal(422, f"each item of {key} must be an object")
    return items
