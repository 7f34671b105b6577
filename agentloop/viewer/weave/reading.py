"""Read calls of weave: by filter and query, in order, in pages, with the columns asked for."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import orjson

from agentloop.files import read_json
from agentloop.viewer.received import STEP, Received
from agentloop.viewer.weave import refs
from agentloop.viewer.weave.calls import TEXTS
from agentloop.viewer.weave.feedback import feedback_of
from agentloop.viewer.weave.queries import MOST_OPERANDS, Columns, Sql, condition, joined, order
from agentloop.viewer.weave.values import (
    dump,
    integer,
    iso,
    raw,
    text,
    texts,
    written,
)
from agentloop.web.refusals import Refusal

STATUS = """CASE WHEN exception IS NOT NULL THEN 'error' WHEN ended_at IS NULL THEN 'running'
 WHEN COALESCE(json_extract(summary, '$.status_counts.error'), 0) > 0 THEN 'descendant_error' ELSE 'success' END"""

SIZE = "(length(attributes) + length(inputs) + COALESCE(length(output), 0) + COALESCE(length(summary), 0))"

TRACE_SIZE = (
    f"(SELECT SUM({SIZE}) FROM calls AS t "  # noqa: S608  # our names
    "WHERE t.project = calls.project AND t.trace_id = calls.trace_id)"
)

COLUMNS = Columns(
    plain={
        **{
            name: name
            for name in (
                "id", "trace_id", "parent_id", "op_name", "display_name", "exception", "thread_id", "turn_id",
                "wb_user_id", "wb_run_id", "wb_run_step", "wb_run_step_end", "started_at", "ended_at",
            )
        },
        "project_id": "project",
        "storage_size_bytes": SIZE,
        "summary.weave.status": STATUS,
        "summary.weave.latency_ms": "((ended_at - started_at) / 1000)",
        "summary.weave.trace_name": "COALESCE(display_name, op_name)",
    },
    documents={name: name for name in ("attributes", "inputs", "output", "summary")},
    times=frozenset({"started_at", "ended_at"}),
    indexed={"attributes.step": ("calls", STEP)},
)  # fmt: skip

_DOCUMENTS = ("attributes", "inputs", "output", "summary")
_SETS = {
    "call_ids": "id", "trace_ids": "trace_id", "parent_ids": "parent_id", "thread_ids": "thread_id",
    "turn_ids": "turn_id", "wb_run_ids": "wb_run_id", "wb_user_ids": "wb_user_id",
}  # fmt: skip
"""A key of weave's filter -> the column that must hold one of its values."""


def stream(received: Received, body: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield the calls that a request asks for, one JSON line each.

    The request is checked, and its first row read, before this function returns: a request that
    cannot be answered is refused then.
    """
    project = text(body, "project_id")
    where = _where(project, body)
    ordered = order(body.get("sort_by"), COLUMNS, "started_at, id")
    limit, offset = integer(body, "limit"), integer(body, "offset", 0)
    sizes = f", {SIZE} AS size" if body.get("include_storage_size") else ""
    sizes += f", {TRACE_SIZE} AS total_size" if body.get("include_total_storage_size") else ""
    query = (
        f"SELECT *, {STATUS} AS status{sizes} FROM calls WHERE {where.text} "  # noqa: S608  # our names
        f"ORDER BY {ordered.text} LIMIT ? OFFSET ?"
    )
    values = (*where.values, *ordered.values, -1 if limit is None else limit, offset)
    shape = _Shape(body)

    def lines() -> Iterator[bytes]:
        with received.reading() as connection:
            for row in connection.execute(query, values):
                yield orjson.dumps(shape.call(connection, row)) + b"\n"

    found = lines()
    first = next(found, None)
    return iter(()) if first is None else chain((first,), found)


def count(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Count the calls that a request names."""
    where = _where(text(body, "project_id"), body)
    limit = integer(body, "limit")
    query = f"SELECT 1 FROM calls WHERE {where.text} LIMIT ?"  # noqa: S608  # our names
    answer: dict[str, Any] = {}
    with received.reading() as connection:
        values = (*where.values, -1 if limit is None else limit)
        (answer["count"],) = connection.execute(f"SELECT COUNT(*) FROM ({query})", values).fetchone()  # noqa: S608
        if body.get("include_total_storage_size"):
            size = f"SELECT COALESCE(SUM({SIZE}), 0) FROM calls WHERE {where.text}"  # noqa: S608  # our names
            (answer["total_storage_size_bytes"],) = connection.execute(size, where.values).fetchone()
    return answer


def read(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return one call, or null."""
    one = {**body, "filter": {"call_ids": [text(body, "id")]}, "limit": 1}
    found = next(stream(received, one), None)
    return {"call": None if found is None else orjson.Fragment(found.rstrip())}


def _where(project: str, body: Mapping[str, Any]) -> Sql:
    parts = [Sql("project = ? AND started_at IS NOT NULL", (project,))]
    chosen = body.get("filter") or {}
    if not isinstance(chosen, Mapping):
        raise Refusal(422, "filter must be an object")
    for key in chosen:
        if key not in _SETS and key not in ("op_names", "input_refs", "output_refs", "trace_roots_only"):
            raise Refusal(422, f"the filter {key!r} is not supported")
    for key, column in _SETS.items():
        if (wanted := texts(chosen, key)) is not None:
            parts.append(Sql(f"{column} IN (SELECT value FROM json_each(?))", (dump(wanted),)))  # noqa: S608
    if (names := texts(chosen, "op_names")) is not None:
        parts.append(_any([_named(name) for name in names]))
    for key, column in (("input_refs", "inputs"), ("output_refs", "output")):
        if (wanted := texts(chosen, key)) is not None:
            parts.append(_any([Sql(f"instr({column}, ?) > 0", (dump(ref),)) for ref in wanted]))
    if chosen.get("trace_roots_only"):
        parts.append(Sql("parent_id IS NULL"))
    if body.get("query") is not None:
        parts.append(condition(body["query"], COLUMNS))
    return Sql(" AND ".join(part.text for part in parts), tuple(value for part in parts for value in part.values))


def _named(name: str) -> Sql:
    """Return the condition for the name of an op: a whole ref, a ref for all versions, or a bare
    name."""
    if name.endswith(":*"):
        return Sql("substr(op_name, 1, ?) = ?", (len(name) - 1, name[:-1]))
    if name.startswith("weave:///"):
        return Sql("op_name = ?", (name,))
    return Sql("(op_name = ? OR instr(op_name, ?) > 0)", (name, f"/op/{name}:"))


def _any(parts: list[Sql]) -> Sql:
    if len(parts) > MOST_OPERANDS:
        raise Refusal(422, f"the filter names more than {MOST_OPERANDS} ops or refs")
    return joined("OR", parts) if parts else Sql("0")


class _Shape:
    """What of a call an answer holds."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        columns = texts(body, "columns")
        self._whole = set(columns) if columns is not None else None
        self._parts: dict[str, list[list[str]]] = {}
        for column in columns or ():
            head, *path = column.split(".")
            if path and head in _DOCUMENTS and head not in (columns or ()):
                self._parts.setdefault(head, []).append(path)
        self._feedback = bool(body.get("include_feedback"))
        self._expand = texts(body, "expand_columns") or []
        if body.get("return_expanded_column_values") is False:
            self._expand = []

    def call(self, connection: sqlite3.Connection, row: sqlite3.Row) -> dict[str, Any]:
        call: dict[str, Any] = {
            "id": row["id"],
            "project_id": row["project"],
            "trace_id": row["trace_id"],
            "op_name": row["op_name"],
            "started_at": iso(row["started_at"]),
            "attributes": {},
            "inputs": {},
        }
        for name in (*TEXTS, "wb_run_step", "wb_run_step_end", "wb_user_id"):
            if self._wants(name):
                call[name] = row[name]
        if self._wants("ended_at"):
            call["ended_at"] = iso(row["ended_at"])
        for name in ("attributes", "inputs", "output"):
            if name in self._parts:
                call[name] = _selected(_parsed(row[name]), self._parts[name])
            elif self._wants(name):
                call[name] = raw(row[name])
        if self._wants("summary") or "summary" in self._parts or self._feedback:
            call["summary"] = self._summary(connection, row)
        for name, key in (("size", "storage_size_bytes"), ("total_size", "total_storage_size_bytes")):
            if name in row.keys():  # noqa: SIM118  # a row is no mapping
                call[key] = row[name]
        for column in self._expand:
            self._expanded(connection, row, call, column)
        for name in _DOCUMENTS:
            if name in call and not isinstance(call[name], orjson.Fragment):
                call[name] = written(call[name])
        return call

    def _wants(self, name: str) -> bool:
        return self._whole is None or name in self._whole

    def _summary(self, connection: sqlite3.Connection, row: sqlite3.Row) -> dict[str, Any]:
        summary = _parsed(row["summary"]) or {}
        facts: dict[str, Any] = {
            "status": row["status"],
            "trace_name": short_name(row["display_name"] or row["op_name"]),
        }
        if row["ended_at"] is not None:
            facts["latency_ms"] = (row["ended_at"] - row["started_at"]) // 1000
        if self._feedback:
            facts["feedback"] = feedback_of(connection, row["project"], row["id"])
        summary["weave"] = facts
        if "summary" in self._parts and not self._feedback:
            return _selected(summary, self._parts["summary"])
        return summary

    def _expanded(self, connection: sqlite3.Connection, row: sqlite3.Row, call: dict[str, Any], column: str) -> None:
        """Put the value of a ref in the place of the ref, if `column` leads to one."""
        head, *path = column.split(".")
        if head not in ("inputs", "output") or not self._wants(head):
            return
        if isinstance(call.get(head), orjson.Fragment):
            call[head] = _parsed(row[head])
        if not path:
            call[head] = refs.value_or_ref(connection, call[head])
            return
        holder: Any = call[head]
        for part in path[:-1]:
            holder = refs.value_or_ref(connection, holder.get(part)) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and path[-1] in holder:
            holder[path[-1]] = refs.value_or_ref(connection, holder[path[-1]])


def short_name(op_name: str) -> str:
    """Return the name of an op without entity, project and version."""
    if not op_name.startswith("weave:///"):
        return op_name
    return op_name.rpartition("/")[2].partition(":")[0]


def _parsed(column: str | None) -> Any:
    return None if column is None else read_json(column.encode())


def _selected(value: Any, paths: list[list[str]]) -> dict[str, Any]:
    """Return the parts of an object at `paths`, in the same places."""
    chosen: dict[str, Any] = {}
    for path in paths:
        source, target = value, chosen
        for part in path[:-1]:
            source = source.get(part) if isinstance(source, dict) else None
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                break
        if isinstance(source, dict) and isinstance(target, dict) and path[-1] in source:
            target[path[-1]] = source[path[-1]]
    return chosen
