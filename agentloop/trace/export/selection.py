"""Choose episodes by their cheap columns, without reading tokens."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from agentloop.errors import TraceError
from agentloop.trace.record import RecordKey

COLUMNS = (
    "step", "split", "version", "part", "parts", "group_id", "sample_index", "task_id", "agent_name", "status",
    "stop_reason", "reward", "reward_parts", "answer", "error", "turn_count", "tool_calls", "length", "prompt_length",
    "sampled", "min_version",
)  # fmt: skip
"""Columns that are chosen by, and that `agentloop trace list` shows."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which episodes are wanted; None: any.

    Attributes:
        search: text in the messages, the answer, the error or the task id; case is ignored.

    Raises:
        TraceError: a bound is NaN.
    """

    status: str | None = None
    min_reward: float | None = None
    max_reward: float | None = None
    task: str | None = None
    search: str | None = None

    def __post_init__(self) -> None:
        for name, bound in (("--min-reward", self.min_reward), ("--max-reward", self.max_reward)):
            if bound is not None and math.isnan(bound):
                raise TraceError(f"{name} nan bounds nothing", "give a number")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of a table that `of` needs."""
        return (*COLUMNS, "messages") if self.search else COLUMNS

    def of(self, table: pa.Table) -> pa.Table:
        """Return the rows of main trajectories that match, with `COLUMNS`."""
        wanted = pc.equal(table["part"], pc.subtract(table["parts"], 1))
        for name in ("step", "split", "group_id", "sample_index"):
            wanted = pc.and_(wanted, pc.is_valid(table[name]))  # a damaged row has no key
        if self.status is not None:
            wanted = pc.and_(wanted, pc.equal(table["status"], self.status))
        if self.task is not None:
            wanted = pc.and_(wanted, pc.equal(table["task_id"], self.task))
        if self.min_reward is not None:
            wanted = pc.and_(wanted, pc.greater_equal(table["reward"], self.min_reward))
        if self.max_reward is not None:
            wanted = pc.and_(wanted, pc.less_equal(table["reward"], self.max_reward))
        if self.search:
            wanted = pc.and_(wanted, _mentions(table, self.search))
        return table.filter(wanted).select(list(COLUMNS))


def _mentions(table: pa.Table, search: str) -> Any:
    """Return which rows hold a text."""
    # Messages are stored as JSON: quotes and newlines are escaped in it.
    escaped = json.dumps(search, ensure_ascii=False)[1:-1]
    hits = pc.fill_null(pc.match_substring(table["messages"], escaped, ignore_case=True), False)
    for name in ("answer", "error", "task_id"):
        hits = pc.or_(hits, pc.fill_null(pc.match_substring(table[name], search, ignore_case=True), False))
    return hits


def none_selected() -> pa.Table:
    """Return a table without a row."""
    from agentloop.trace.store import SCHEMA

    return pa.schema([SCHEMA.field(name) for name in COLUMNS]).empty_table()


def best_of_groups(table: pa.Table) -> pa.Table:
    """Return of each group the episode with the highest reward; of equal ones, the first."""
    best: dict[tuple[Any, ...], tuple[float, int]] = {}
    columns = (table[name].to_pylist() for name in ("step", "split", "group_id", "reward"))
    for place, (step, split, group, reward) in enumerate(zip(*columns, strict=True)):
        if reward is not None and reward == reward:
            key = (step, split, group)
            if key not in best or reward > best[key][0]:
                best[key] = (reward, place)
    return table.take(pa.array(sorted(place for _, place in best.values()), pa.int64()))


def key_of(row: dict[str, Any]) -> str:
    """Return the key of a row of a table."""
    return str(RecordKey(row["split"], row["step"], row["group_id"], row["sample_index"], row["part"]))
