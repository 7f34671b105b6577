"""Calls of weave clients and spans of OpenTelemetry senders, as the page lists and shows them."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from agentloop.files import json_line, read_json
from agentloop.viewer import hits
from agentloop.viewer.received import Received
from agentloop.viewer.weave import objects
from agentloop.viewer.weave.feedback import feedback_of
from agentloop.viewer.weave.files import answer as file_answer
from agentloop.viewer.weave.reading import STATUS, short_name
from agentloop.web.refusals import Refusal

MOST_ROWS = 1000
MOST_CALLS = 5000
"""Calls of one trace that are shown."""

PREVIEW = 200
"""Characters of an output in the table."""

INSIDE = "error inside"
"""Status of a call that did not fail itself, while one below it did."""

CALLS = f"""
SELECT 'weave' AS source, id, substr(project, 1, instr(project, '/') - 1) AS entity,
    substr(project, instr(project, '/') + 1) AS project, op_name, display_name, started_at, ended_at,
    CASE {STATUS} WHEN 'running' THEN 'running' WHEN 'error' THEN 'error' WHEN 'descendant_error' THEN '{INSIDE}'
        ELSE CASE WHEN parent_id IS NULL AND EXISTS (SELECT 1 FROM calls AS c WHERE c.project = calls.project
            AND c.trace_id = calls.trace_id AND c.exception IS NOT NULL) THEN '{INSIDE}' ELSE 'ok' END END AS status,
    exception, trace_id, parent_id, inputs, output, parent_id IS NULL AS root
FROM calls WHERE started_at IS NOT NULL"""  # noqa: S608  # our names

SPANS = f"""
SELECT 'otlp' AS source, trace_id || '-' || span_id AS id, 'otlp' AS entity,
    COALESCE(CAST(json_extract(resource, '$."openinference.project.name"') AS TEXT), service) AS project,
    name AS op_name,
    CASE WHEN parent_id IS NULL THEN name || ' ' || json_extract(attributes, '$."gen_ai.conversation.id"') END
        AS display_name, started_at, ended_at, CASE WHEN ended_at IS NULL THEN 'running'
        WHEN status != 'error' AND parent_id IS NULL AND EXISTS (SELECT 1 FROM spans AS c
            WHERE c.trace_id = spans.trace_id AND c.status = 'error') THEN '{INSIDE}' ELSE status END AS status,
    message AS exception, trace_id, CASE WHEN parent_id IS NOT NULL THEN trace_id || '-' || parent_id END AS parent_id,
    attributes AS inputs, attributes AS output,
    parent_id IS NULL OR NOT EXISTS (SELECT 1 FROM spans AS p WHERE p.trace_id = spans.trace_id
        AND p.span_id = spans.parent_id) AS root
FROM spans WHERE 1"""  # noqa: S608  # our names
"""Both tables in one form. A span whose parent was not sent is the root of what was. A run of
agentloop names itself as the project, and an episode by its key as the conversation."""

ROWS = f"{CALLS} UNION ALL {SPANS}"

SORTS: Mapping[str, str] = {
    "started_at": "started_at",
    "duration_s": "(ended_at - started_at)",
    "op_name": "COALESCE(display_name, op_name)",
    "status": "status",
    "project": "entity || '/' || project",
    "source": "source",
}

PARAMETERS = ("place", "entity", "project", "q", "op", "source", "status", "sort", "offset", "limit", "all")
"""Of a list of calls."""

INPUTS = (
    "gen_ai.input.messages",
    "gen_ai.prompt",
    "gen_ai.tool.call.arguments",
    "input.value",
    "traceloop.entity.input",
)
OUTPUTS = (
    "gen_ai.output.messages", "gen_ai.completion", "gen_ai.tool.call.result", "output.value", "traceloop.entity.output",
)  # fmt: skip
"""Attributes in which senders put what went into a span and what came out."""

Text = Annotated[str | None, Query()]
Number = Annotated[int, Query(ge=0)]


def build_router(received: Received) -> APIRouter:
    """Return the routes below `/api/external`."""
    router = APIRouter(prefix="/api/external")

    @router.get("/calls")
    def calls(
        request: Request,
        place: Text = None,
        entity: Text = None,
        project: Text = None,
        q: Text = None,
        op: Text = None,
        source: Text = None,
        status: Annotated[list[str] | None, Query()] = None,
        sort: str = "-started_at",
        offset: Number = 0,
        limit: Annotated[int, Query(ge=0, le=MOST_ROWS)] = 100,
        all: bool = False,  # the name in the query
    ) -> Response:
        """List the roots of traces, `q` also those in which a call below the root was found; all
        calls with `all`. `place` is entity and project as `lab/agents`."""
        if unknown := [name for name in request.query_params if name not in PARAMETERS]:
            raise Refusal(400, f"{unknown[0][:80]!r} is not a filter of calls", f"these are: {', '.join(PARAMETERS)}")
        chosen = {"entity || '/' || project": place, "entity": entity, "project": project, "source": source}
        with received.reading() as connection:
            return _json(_page(connection, _Filter(chosen, q, op, status, all), sort, offset, limit))

    @router.get("/call")
    def call(id: str, entity: Text = None, project: Text = None) -> Response:  # the name in the query
        """Return one call, and all calls of its trace."""
        with received.reading() as connection:
            return _json(_one(connection, id, entity, project))

    @router.get("/object")
    def stored_object(entity: str, project: str, name: str, digest: str) -> Response:
        """Return a version of an object that a weave client published."""
        return _json(objects.read(received, {"project_id": f"{entity}/{project}", "object_id": name, "digest": digest}))

    @router.get("/file/{digest}")
    def file(digest: str) -> Response:
        """Return a file that a call refers to, such as an image."""
        return file_answer(received, digest)

    return router


class _Filter:
    def __init__(
        self, chosen: Mapping[str, str | None], q: str | None, op: str | None, status: list[str] | None, whole: bool
    ) -> None:
        self.parts: list[str] = [] if whole else ["root"]
        self.values: list[Any] = []
        for column, value in chosen.items():
            if value:
                self._add(f"{column} = ?", value)
        self.below = "" if whole else q or ""
        if self.below:
            self.parts.append(hits.IN_FOUND_TRACES)
        elif q:
            self._add(hits.FOUND, q)
        if op:
            self._add("instr(op_name, ?) > 0", op)
        self._status = status

    def _add(self, part: str, value: Any) -> None:
        self.parts.append(part)
        self.values.append(value)

    def where(self, *, with_status: bool) -> tuple[str, list[Any]]:
        """Return the condition, and the values of its placeholders."""
        parts, values = list(self.parts), list(self.values)
        if with_status and self._status:
            parts.append(f"status IN ({', '.join('?' * len(self._status))})")
            values += self._status
        return " AND ".join(parts) or "1", values


def _page(connection: sqlite3.Connection, chosen: _Filter, sort: str, offset: int, limit: int) -> dict[str, Any]:
    name, direction = sort.removeprefix("-"), "DESC" if sort.startswith("-") else "ASC"
    if name not in SORTS:
        raise Refusal(422, f"sort: {name!r} is not a column", f"the columns are {', '.join(SORTS)}")
    if chosen.below:
        hits.search(connection, ROWS, chosen.below)
    where, values = chosen.where(with_status=True)
    (total,) = connection.execute(f"SELECT COUNT(*) FROM ({ROWS}) WHERE {where}", values).fetchone()  # noqa: S608
    # Only what is sorted by: whole rows hold whole conversations.
    keys = connection.execute(
        f"SELECT source, entity, project, id FROM ({ROWS}) WHERE {where} "  # noqa: S608  # our names
        f"ORDER BY {SORTS[name]} {direction}, id LIMIT ? OFFSET ?",
        (*values, limit, offset),
    ).fetchall()
    rows = [row for key in keys if (row := _find(connection, key["id"], key["entity"], key["project"])) is not None]
    where, values = chosen.where(with_status=False)
    status = dict(
        connection.execute(
            f"SELECT status, COUNT(*) FROM ({ROWS}) WHERE {where} GROUP BY status",  # noqa: S608  # our names
            values,
        ).fetchall()
    )
    projects = connection.execute(
        f"SELECT entity, project, COUNT(*) AS calls FROM ({ROWS}) WHERE root GROUP BY entity, project "  # noqa: S608
        "ORDER BY calls DESC LIMIT 200"
    ).fetchall()
    return {
        "total": total,
        "rows": [{**_row(row), **_counts(connection, row), **_hit(connection, row, chosen.below)} for row in rows],
        "projects": [dict(project) for project in projects],
        "facets": {"status": status},
    }


def _hit(connection: sqlite3.Connection, row: sqlite3.Row, words: str) -> dict[str, Any]:
    """Return what a search found below a call: `{hit: {id, name, text}}`, or nothing."""
    found = hits.hit_of(connection, row) if words else None
    one = None if found is None else _find(connection, found["id"], found["entity"], found["project"])
    if one is None:
        return {}
    name = one["display_name"] or short_name(one["op_name"])
    return {"hit": {"id": one["id"], "name": name, "text": hits.excerpt(one, words)}}


def _one(connection: sqlite3.Connection, call: str, entity: str | None, project: str | None) -> dict[str, Any]:
    row = _find(connection, call, entity, project)
    if row is None:
        raise Refusal(404, f"the call {call[:80]!r} does not exist here")
    if row["source"] == "weave":
        query, place = f"{CALLS} AND calls.project = ? AND trace_id = ?", [f"{row['entity']}/{row['project']}"]
        whole = _weave(connection, row)
    else:
        query, place = f"{SPANS} AND trace_id = ?", []
        whole = _span(connection, row)
    tree = connection.execute(f"{query} ORDER BY started_at, id LIMIT ?", (*place, row["trace_id"], MOST_CALLS))
    return {
        "call": {**_row(row), **_counts(connection, row), **whole},
        "tree": [_row(one) for one in _parents_first(tree.fetchall())],
    }


def _find(connection: sqlite3.Connection, call: str, entity: str | None, project: str | None) -> sqlite3.Row | None:
    """Return the row of a call, or None. A weave client may choose one id in several projects."""
    trace, mark, span = call.partition("-")
    if entity in (None, "otlp") and mark and len(trace) == 32 and len(span) == 16:
        found = connection.execute(f"{SPANS} AND trace_id = ? AND span_id = ?", (trace, span)).fetchone()
    elif entity and project:
        place = (f"{entity}/{project}", call)
        found = connection.execute(f"{CALLS} AND calls.project = ? AND calls.id = ?", place).fetchone()
    else:
        found = connection.execute(f"{CALLS} AND calls.id = ? ORDER BY started_at DESC LIMIT 1", (call,)).fetchone()
    row: sqlite3.Row | None = found
    return row


def _row(row: sqlite3.Row) -> dict[str, Any]:
    started, ended = row["started_at"], row["ended_at"]
    return {
        **{
            name: row[name]
            for name in ("source", "id", "entity", "project", "status", "exception", "trace_id", "parent_id")
        },
        "op_name": short_name(row["op_name"]),
        "display_name": row["display_name"],
        "started_at": started / 1e6,
        "ended_at": None if ended is None else ended / 1e6,
        "duration_s": None if ended is None else (ended - started) / 1e6,
        "preview": _preview(row),
    }


def _counts(connection: sqlite3.Connection, row: sqlite3.Row) -> dict[str, int]:
    """Return how many calls are directly inside a call, and its pieces of feedback."""
    if row["source"] == "weave":
        project = f"{row['entity']}/{row['project']}"
        inside = "SELECT COUNT(*) FROM calls WHERE project = ? AND parent_id = ?"
        said = "SELECT COUNT(*) FROM feedback WHERE project = ? AND weave_ref = ?"
        (children,) = connection.execute(inside, (project, row["id"])).fetchone()
        (feedback,) = connection.execute(said, (project, f"weave:///{project}/call/{row['id']}")).fetchone()
        return {"children": children, "feedback": feedback}
    trace, _, span = row["id"].partition("-")
    inside = "SELECT COUNT(*) FROM spans WHERE trace_id = ? AND parent_id = ?"
    (children,) = connection.execute(inside, (trace, span)).fetchone()
    return {"children": children, "feedback": 0}


def _preview(row: sqlite3.Row) -> str:
    if row["source"] == "weave":
        text = "" if row["output"] in (None, "null") else row["output"]
        return text[1 : PREVIEW + 1].removesuffix('"') if text.startswith('"') else text[:PREVIEW]
    attributes = read_json(row["output"].encode())
    found = next((attributes[name] for name in OUTPUTS if name in attributes), "")
    return str(found)[:PREVIEW]


def _weave(connection: sqlite3.Connection, row: sqlite3.Row) -> dict[str, Any]:
    project = f"{row['entity']}/{row['project']}"
    query = "SELECT attributes, inputs, output, summary FROM calls WHERE project = ? AND id = ?"
    found = connection.execute(query, (project, row["id"])).fetchone()
    parts = {name: None if found[name] is None else read_json(found[name].encode()) for name in found.keys()}  # noqa: SIM118
    return {**parts, "feedback": feedback_of(connection, project, row["id"])}


def _span(connection: sqlite3.Connection, row: sqlite3.Row) -> dict[str, Any]:
    trace, _, span = row["id"].partition("-")
    query = "SELECT * FROM spans WHERE trace_id = ? AND span_id = ?"
    found = connection.execute(query, (trace, span)).fetchone()
    attributes = read_json(found["attributes"].encode())
    return {
        "inputs": {name: _structured(attributes.pop(name)) for name in INPUTS if name in attributes},
        "output": {name: _structured(attributes.pop(name)) for name in OUTPUTS if name in attributes},
        "attributes": {**attributes, "span.kind": found["kind"]},
        "summary": {"resource": read_json(found["resource"].encode()), "events": read_json(found["events"].encode())},
        "feedback": [],
    }


def _structured(value: Any) -> Any:
    """Return a text that holds JSON as what it holds: attributes are texts."""
    if not isinstance(value, str) or not value.startswith(("{", "[")):
        return value
    try:
        return read_json(value.encode())
    except ValueError:
        return value


def _parents_first(rows: list[sqlite3.Row]) -> list[sqlite3.Row]:
    """Order calls so that each comes after its parent, by start among those of one parent."""
    known = {row["id"] for row in rows}
    inside: dict[str | None, list[sqlite3.Row]] = {}
    for row in rows:
        inside.setdefault(row["parent_id"] if row["parent_id"] in known else None, []).append(row)
    ordered: list[sqlite3.Row] = []
    waiting = list(reversed(inside.get(None, [])))
    while waiting:
        row = waiting.pop()
        ordered.append(row)
        waiting += reversed(inside.get(row["id"], []))
    return ordered  # a call that is its own ancestor is left out


def _json(value: Any) -> Response:
    return Response(json_line(value), media_type="application/json", headers={"Cache-Control": "no-store"})
