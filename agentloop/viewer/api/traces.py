"""Which episode a trace belongs to: runs may share a name, and sent spans hold the name only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from agentloop.errors import TraceError
from agentloop.trace.exporting import is_trace_id
from agentloop.viewer.api.run import PATIENCE_S, Run

MOST = 20
"""Episodes of one trace that are named."""


def trace_json(runs: Sequence[Run], trace_id: str) -> dict[str, Any]:
    """Return the episodes of a trace in all runs: `{episodes: [{run, name, key}], indexing}`.

    `indexing` says that a run's index was not complete: ask again. Several episodes are copies.
    """
    if not is_trace_id(trace_id):
        return {"episodes": [], "indexing": False}
    found: list[dict[str, Any]] = []
    indexing = False
    until = time.monotonic() + PATIENCE_S  # for all runs together
    for run in runs:
        if not run.has_traces:
            continue
        try:
            rows = run.index(max(0.0, until - time.monotonic())).of_trace(trace_id)
        except TraceError:
            continue  # the run's own pages name what is wrong
        indexing = indexing or run.indexing
        found += [{"run": run.id, "name": run.name, "key": row["key"]} for row in rows]
    return {"episodes": found[:MOST], "indexing": indexing}
