"""Metrics of a run as series, thinned to what a plot can show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentloop.report.reading import RunRecord
from agentloop.text import finite

MOST_POINTS = 5_000


def metrics_json(record: RunRecord, keys: Sequence[str], points: int) -> dict[str, Any]:
    """Return `{steps, series, keys, every}`.

    Args:
        keys: wanted series; those that the run does not have are left out.
        points: of a longer run, consecutive steps are averaged to this many; `steps` has the last
            of each, `every` says how many they are.
    """
    rows = record.rows
    known = sorted({key for row in rows for key, value in row.items() if key != "step" and finite(value) is not None})
    every = max(1, -(-len(rows) // points))
    parts = _parts(rows, points)
    return {
        "steps": [int(part[-1]["step"]) for part in parts],
        "series": {key: [_mean(part, key) for part in parts] for key in keys if key in known},
        "keys": known,
        "every": every,
    }


def thin(rows: Sequence[dict[str, Any]], key: str, points: int) -> list[float | None]:
    """Return one series of at most `points` values: means of consecutive steps."""
    return [_mean(part, key) for part in _parts(rows, points)]


def _parts(rows: Sequence[dict[str, Any]], points: int) -> list[Sequence[dict[str, Any]]]:
    every = max(1, -(-len(rows) // points))
    return [rows[i : i + every] for i in range(0, len(rows), every)]


def _mean(part: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [value for row in part if (value := finite(row.get(key))) is not None]
    return sum(values) / len(values) if values else None
