"""Search all calls of the traces whose roots are listed, and show what was found in each."""

from __future__ import annotations

import sqlite3

import orjson

BEFORE, AFTER = 24, 120
"""Characters on each side of the words that were found: a line of a table shows them."""

TEXTS = ("exception", "display_name", "op_name", "inputs", "output")
"""Columns that are searched; the first that holds the words is shown."""

FOUND = "instr(lower({}), lower(?)) > 0".format(" || ' ' || ".join(f"COALESCE({name}, '')" for name in TEXTS))

PLACE = "CASE source WHEN 'weave' THEN entity || '/' || project ELSE '' END"
"""Names a trace together with its id. Spans of one trace may come from several services."""

IN_FOUND_TRACES = f"(source, {PLACE}, trace_id) IN (SELECT source, place, trace_id FROM temp.hits)"  # noqa: S608  # our names
"""Condition on rows, after `search`."""


def search(connection: sqlite3.Connection, rows: str, words: str) -> None:
    """Note the traces with a call that holds some words, in a table that ends with the transaction.

    Of each trace it names one call: a root that holds them, or else the earliest.

    Args:
        rows: a query of all calls, as `external.ROWS`.
    """
    connection.execute("DROP TABLE IF EXISTS temp.hits")
    connection.execute(
        f"CREATE TEMP TABLE hits AS SELECT source, {PLACE} AS place, trace_id, entity, project, id, root, "  # noqa: S608  # our names
        f"MIN(CASE WHEN root THEN 0 ELSE started_at END) AS first FROM ({rows}) WHERE {FOUND} GROUP BY 1, 2, 3",
        (words,),
    )
    connection.execute("CREATE INDEX temp.hits_by_trace ON hits (source, place, trace_id)")


def hit_of(connection: sqlite3.Connection, row: sqlite3.Row) -> sqlite3.Row | None:
    """Return the call below a listed one that `search` found: its `entity`, `project` and `id`.

    None: the listed one holds the words itself.
    """
    place = f"{row['entity']}/{row['project']}" if row["source"] == "weave" else ""
    found: sqlite3.Row | None = connection.execute(
        "SELECT entity, project, id FROM temp.hits WHERE source = ? AND place = ? AND trace_id = ? AND NOT root",
        (row["source"], place, row["trace_id"]),
    ).fetchone()
    return found


def excerpt(row: sqlite3.Row, words: str) -> str:
    """Return where a call holds some words, with the text around them."""
    for value in (_in_words(row["exception"]), *(row[name] for name in TEXTS)):
        text = str(value or "")
        at = text.lower().find(words.lower())
        if at >= 0:
            start, end = max(0, at - BEFORE), at + len(words) + AFTER
            return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")
    return ""


def _in_words(exception: str | None) -> str:
    """Return what weave's client sends as JSON with `type` and `message`."""
    try:
        found = orjson.loads(exception or "")
    except orjson.JSONDecodeError:
        return ""
    return f"{found['type']}: {found.get('message', '')}" if isinstance(found, dict) and "type" in found else ""
