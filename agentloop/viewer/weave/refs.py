"""Refs of weave, `weave:///entity/project/object/name:digest/key/...`, and what they lead to."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import orjson

from agentloop.files import json_line, read_json
from agentloop.viewer.received import Received
from agentloop.viewer.weave.values import texts
from agentloop.web.refusals import Refusal

SCHEME = "weave:///"
MOST_REFS = 10_000
DEEPEST = 16
"""Most refs that lead to one another."""

MOST_BYTES = 64 * 2**20
"""Most bytes of an answer, and of the objects that are read for it."""


@dataclass(slots=True)
class Known:
    """Objects that one request has read, by ref, so that each is read once."""

    values: dict[tuple[str, str], Any] = field(default_factory=dict)
    size: int = 0

    def add(self, size: int) -> None:
        """Count bytes.

        Raises:
            Refusal: they are too many.
        """
        self.size += size
        if self.size > MOST_BYTES:
            raise Refusal(413, f"the refs lead to more than {MOST_BYTES} bytes", "ask for fewer refs at once")


def read_batch(received: Received, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each ref; null for one that leads nowhere."""
    wanted = texts(body, "refs")
    if wanted is None or len(wanted) > MOST_REFS:
        raise Refusal(422, f"refs must be a list of at most {MOST_REFS} texts")
    found: dict[str, bytes] = {}
    known, answer = Known(), Known()
    with received.reading() as connection:
        for ref in wanted:
            if ref not in found:
                found[ref] = json_line(value_of(connection, ref, known=known)).rstrip()
            answer.add(len(found[ref]))
    return {"vals": [orjson.Fragment(found[ref]) for ref in wanted]}


def value_or_ref(connection: sqlite3.Connection, value: Any) -> Any:
    """Return what a value leads to if it is a ref that leads somewhere, else the value."""
    if not isinstance(value, str) or not value.startswith(SCHEME):
        return value
    found = value_of(connection, value)
    return value if found is None else found


def value_of(connection: sqlite3.Connection, ref: str, depth: int = 0, known: Known | None = None) -> Any:
    """Return the value of a ref, or None.

    Args:
        known: objects that were read before; what is returned may be part of them.
    """
    parts = [unquote(part) for part in ref.removeprefix(SCHEME).split("/")]
    if not ref.startswith(SCHEME) or len(parts) < 4 or depth > DEEPEST:
        return None
    project, kind, name, extra = "/".join(parts[:2]), parts[2], parts[3], parts[4:]
    if kind in ("object", "op"):
        object_id, _, digest = name.rpartition(":")
        if known is None or (project, name) not in known.values:
            row = find(connection, project, object_id, digest)
            if row is not None and known is not None:
                known.add(len(row["val"]))
            value = None if row is None else read_json(row["val"].encode())
            if known is not None:
                known.values[project, name] = value
        else:
            value = known.values[project, name]
        return _within(connection, value, extra, depth, known)
    if kind == "table":
        return _within(connection, ref_of_table(project, name), extra, depth, known)
    return None


def find(connection: sqlite3.Connection, project: str, object_id: str, digest: str) -> sqlite3.Row | None:
    """Return an object's row: by its digest, as `latest`, or as `v` and the number of a version."""
    known = "SELECT * FROM objects WHERE project = ? AND object_id = ? AND deleted_at IS NULL"
    values: tuple[Any, ...] = (project, object_id)
    if digest == "latest":
        found = connection.execute(f"{known} ORDER BY version_index DESC LIMIT 1", values)
    elif digest.startswith("v") and _is_number(digest[1:]) and len(digest) < 12:
        found = connection.execute(f"{known} AND version_index = ?", (*values, int(digest[1:])))
    else:
        found = connection.execute(f"{known} AND digest = ?", (*values, digest))
    row: sqlite3.Row | None = found.fetchone()
    return row


def ref_of_table(project: str, digest: str) -> str:
    """Return the ref of a table."""
    return f"{SCHEME}{project}/table/{digest}"


def row_of(connection: sqlite3.Connection, project: str, digest: str) -> Any:
    """Return the value of a table's row, or None."""
    row = connection.execute("SELECT val FROM rows WHERE project = ? AND digest = ?", (project, digest)).fetchone()
    return None if row is None else read_json(row["val"].encode())


def _is_number(digits: str) -> bool:
    return digits.isascii() and digits.isdecimal() and len(digits) < 12


def _within(connection: sqlite3.Connection, value: Any, extra: list[str], depth: int, known: Known | None) -> Any:
    """Follow the rest of a ref: pairs of what to look up (attr, key, index, id) and its name."""
    for how, name in zip(extra[::2], extra[1::2], strict=False):
        if how == "id" and isinstance(value, str) and value.startswith(f"{SCHEME}") and "/table/" in value:
            project = "/".join(value.removeprefix(SCHEME).split("/")[:2])
            value = row_of(connection, project, name)
            continue
        if isinstance(value, str) and value.startswith(SCHEME):
            value = value_of(connection, value, depth + 1, known)
        if how in ("attr", "key") and isinstance(value, dict):
            value = value.get(name)
        elif how == "index" and isinstance(value, list) and _is_number(name) and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value
