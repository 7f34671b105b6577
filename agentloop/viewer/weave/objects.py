"""Objects of weave, published values and the code of ops: versions, each named by its digest."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any

from agentloop.viewer.received import Received
from agentloop.viewer.weave.queries import Columns, order
from agentloop.viewer.weave.refs import find
from agentloop.viewer.weave.values import (
    checked,
    digest_of_value,
    dump,
    integer,
    iso,
    mapping,
    now,
    optional_text,
    raw,
    text,
    texts,
)
from agentloop.web.refusals import Refusal

COLUMNS = Columns(
    plain={"object_id": "object_id", "created_at": "created_at", "version_index": "version_index"}, documents={}
)


def create(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Store a version of an object, once for each digest."""
    given = mapping(body, "obj")
    project, object_id, value = text(given, "project_id"), text(given, "object_id"), given.get("val")
    digest = checked(digest_of_value(value), given)
    base, leaf = _classes(value, optional_text(given, "set_base_object_class"))
    with received.writing() as connection:
        (versions,) = connection.execute(
            "SELECT COUNT(*) FROM objects WHERE project = ? AND object_id = ?", (project, object_id)
        ).fetchone()
        connection.execute(
            "INSERT INTO objects VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL) "
            "ON CONFLICT (project, object_id, digest) DO UPDATE SET deleted_at = NULL",
            (project, object_id, digest, versions, now(), _kind(value), base, leaf, dump(value)),
        )
    return {"digest": digest, "object_id": object_id}


def read(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return one version of an object."""
    project, object_id, digest = (text(body, key) for key in ("project_id", "object_id", "digest"))
    with received.reading() as connection:
        row = find(connection, project, object_id, digest)
        if row is None:
            raise Refusal(404, f"the object {object_id}:{digest} of {project} does not exist")
        return {"obj": _shown(row, _latest(connection, row), bool(body.get("metadata_only")))}


def query(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return versions of objects by filter."""
    chosen = body.get("filter") or {}
    if not isinstance(chosen, Mapping):
        raise Refusal(422, "filter must be an object")
    newest = (
        "(SELECT MAX(version_index) FROM objects AS n WHERE n.project = objects.project "
        "AND n.object_id = objects.object_id AND n.deleted_at IS NULL)"
    )
    parts, values = ["project = ? AND deleted_at IS NULL"], [text(body, "project_id")]
    for key, column, word in (
        ("object_ids", "object_id", "IN"),
        ("base_object_classes", "base_object_class", "IN"),
        ("leaf_object_classes", "leaf_object_class", "IN"),
        ("exclude_base_object_classes", "COALESCE(base_object_class, '')", "NOT IN"),
    ):
        if (wanted := texts(chosen, key)) is not None:
            parts.append(f"{column} {word} (SELECT value FROM json_each(?))")  # noqa: S608  # our names
            values.append(dump(wanted))
    if chosen.get("is_op") is not None:
        parts.append("kind = 'op'" if chosen["is_op"] else "kind != 'op'")
    if chosen.get("latest_only"):
        parts.append(f"version_index = {newest}")
    ordered = order(body.get("sort_by"), COLUMNS, "created_at, object_id, version_index")
    limit, offset = integer(body, "limit"), integer(body, "offset", 0)
    with received.reading() as connection:
        rows = connection.execute(
            f"SELECT *, version_index = {newest} AS is_latest FROM objects "  # noqa: S608  # our names
            f"WHERE {' AND '.join(parts)} ORDER BY {ordered.text} LIMIT ? OFFSET ?",
            (*values, *ordered.values, -1 if limit is None else limit, offset),
        ).fetchall()
    return {"objs": [_shown(row, bool(row["is_latest"]), bool(body.get("metadata_only"))) for row in rows]}


def delete(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Delete versions of an object; all if none is named."""
    project, object_id, digests = text(body, "project_id"), text(body, "object_id"), texts(body, "digests")
    with received.writing() as connection:
        rows = (
            connection.execute(
                "SELECT * FROM objects WHERE project = ? AND object_id = ? AND deleted_at IS NULL", (project, object_id)
            ).fetchall()
            if digests is None
            else [row for digest in digests if (row := find(connection, project, object_id, digest)) is not None]
        )
        if not rows:
            raise Refusal(404, f"the object {object_id} of {project} has no such version")
        for row in rows:
            connection.execute(
                "UPDATE objects SET deleted_at = ? WHERE project = ? AND object_id = ? AND digest = ?",
                (now(), project, object_id, row["digest"]),
            )
    return {"num_deleted": len(rows), "deleted_versions": [{"digest": row["digest"]} for row in rows]}


def _shown(row: sqlite3.Row, latest: bool, bare: bool) -> dict[str, Any]:
    return {
        "project_id": row["project"],
        "object_id": row["object_id"],
        "digest": row["digest"],
        "version_index": row["version_index"],
        "is_latest": int(latest),
        "created_at": iso(row["created_at"]),
        "deleted_at": None,
        "kind": row["kind"],
        "base_object_class": row["base_object_class"],
        "leaf_object_class": row["leaf_object_class"],
        "val": {} if bare else raw(row["val"]),
        "size_bytes": len(row["val"]),
    }


def _latest(connection: sqlite3.Connection, row: sqlite3.Row) -> bool:
    newest = find(connection, row["project"], row["object_id"], "latest")
    return newest is not None and newest["digest"] == row["digest"]


def _kind(value: object) -> str:
    kind = value.get("weave_type") if isinstance(value, Mapping) and value.get("_type") == "CustomWeaveType" else None
    return "op" if isinstance(kind, Mapping) and kind.get("type") == "Op" else "object"


def _classes(value: object, given: str | None) -> tuple[str | None, str | None]:
    """Return the base and the leaf class that a serialized weave object names."""
    bases = value.get("_bases") if isinstance(value, Mapping) else None
    leaf = value.get("_class_name") if isinstance(value, Mapping) else None
    if not isinstance(bases, list) or not isinstance(leaf, str) or bases[-1:] != ["BaseModel"] or len(bases) < 2:
        return given, given
    base = bases[-3] if len(bases) > 2 and isinstance(bases[-3], str) else leaf
    return given or base, leaf
