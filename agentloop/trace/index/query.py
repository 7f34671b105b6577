"""Filters and orders of episodes, as SQL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from agentloop.trace.index.search import match_expression

CHOICES = ("split", "status", "stop_reason", "agent_name", "data_source", "task_id", "group_id", "broken_rule", "cause")
"""Columns that a filter compares with one or more texts."""

RANGES = (
    "step", "version", "reward", "outcome", "staleness", "turns", "tool_calls", "malformed_calls", "tool_errors",
    "length", "prompt_length", "sampled", "mismatch", "advantage", "latency_s", "sample_index", "dataset_row",
)  # fmt: skip
"""Columns that a filter bounds from below and above."""

SORTS = (*RANGES, "split", "status", "stop_reason", "agent_name", "data_source", "task_id", "group_id")
"""Columns that episodes can be sorted by."""


@dataclass(frozen=True, slots=True)
class EpisodeFilter:
    """Which episodes of a run are wanted. An empty filter wants all of them.

    Attributes:
        choices: a column of `CHOICES`, and the texts of which one must be equal to it.
        ranges: a column of `RANGES`, and its least and greatest value; None: unbounded.
        search: words, as `search.match_expression` reads them; empty: any text.
    """

    choices: tuple[tuple[str, tuple[str, ...]], ...] = ()
    ranges: tuple[tuple[str, float | None, float | None], ...] = ()
    search: str = ""

    def where(self) -> tuple[str, list[Any]]:
        """Return a condition and its parameters.

        Raises:
            SearchError: the search cannot be understood.
            ValueError: a column has no such filter.
        """
        conditions: list[str] = []
        values: list[Any] = []
        for column, texts in self.choices:
            if column not in CHOICES:
                raise ValueError(f"episodes cannot be chosen by {column}")
            conditions.append(f"{column} IN ({', '.join('?' * len(texts))})")
            values += texts
        for column, least, most in self.ranges:
            if column not in RANGES:
                raise ValueError(f"episodes cannot be bounded by {column}")
            for sign, bound in ((">=", least), ("<=", most)):
                if bound is not None:
                    conditions.append(f"{column} {sign} ?")
                    values.append(bound)
        if self.search:
            conditions.append("id IN (SELECT rowid FROM words WHERE words MATCH ?)")
            values.append(match_expression(self.search))
        return " AND ".join(conditions) or "1", values


@dataclass(frozen=True, slots=True)
class Sort:
    """An order of episodes: by a column, then as they were written. Unknown values come last."""

    column: str = "step"
    descending: bool = field(default=True)

    @classmethod
    def parse(cls, text: str) -> Sort:
        """Read `reward` or, for the highest first, `-reward`.

        Raises:
            ValueError: episodes cannot be sorted by it.
        """
        column = text.removeprefix("-")
        if column not in SORTS:
            raise ValueError(f"episodes cannot be sorted by {column!r}")
        return cls(column, text.startswith("-"))

    def order(self) -> str:
        """Return the terms of an ORDER BY."""
        way = "DESC" if self.descending else "ASC"
        return f"{self.column} {way} NULLS LAST, id"
