"""The steps that rules compare: the first ones of a run, and the latest."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentloop.text import finite
from agentloop.trace.signals.facts import EpisodeFacts, StepFacts

Row = Mapping[str, Any]

WIDTH = 5
"""Steps at the beginning, and at the end, that are compared."""

RISE = 0.25
"""Standard deviations of a step's rewards by which the reward must rise to count as a gain."""


@dataclass(slots=True)
class Evidence:
    """What is known of a run.

    Attributes:
        rows: lines of `metrics.jsonl`, by step; the evaluation before training may be the first.
        steps: facts of recorded steps, by step: at least the first `WIDTH` and the last `WIDTH`.
        run_dir: for the commands that a sentence names; None: unknown.
    """

    rows: Sequence[Row]
    steps: Sequence[StepFacts] = ()
    run_dir: Path | None = None
    train: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        self.train = [row for row in self.rows if finite(row.get("reward/mean")) is not None]

    @property
    def step(self) -> int:
        """The latest step."""
        steps = [int(step) for row in self.rows if (step := finite(row.get("step"))) is not None]
        return max([*steps, *(facts.step for facts in self.steps)], default=0)

    @property
    def late(self) -> list[StepFacts]:
        """The latest recorded steps; empty while there are fewer than `WIDTH`."""
        return list(self.steps[-WIDTH:]) if len(self.steps) >= WIDTH else []

    @property
    def early(self) -> list[StepFacts]:
        """The first recorded steps; empty while they would overlap the latest."""
        return list(self.steps[:WIDTH]) if len(self.steps) >= 2 * WIDTH else []

    def series(self, key: str) -> list[tuple[int, float]]:
        """Return (step, value) of the rows that have a finite number at `key`."""
        return [
            (int(step), value)
            for row in self.rows
            if (value := finite(row.get(key))) is not None and (step := finite(row.get("step"))) is not None
        ]

    def values(self, key: str) -> list[float]:
        """Return the finite numbers at `key`, by step."""
        return [value for _, value in self.series(key)]

    def reward_gain(self) -> float | None:
        """Return by how many standard deviations of a step's rewards the reward rose from the first
        steps to the latest; None while the run is too short to say."""
        ends = first_and_last(self.values("reward/mean"))
        if ends is None:
            return None
        return (ends[1] - ends[0]) / self.scale

    @property
    def scale(self) -> float:
        """The usual standard deviation of a step's rewards; never 0."""
        spreads = [spread for spread in self.values("reward/std") if spread > 0]
        return statistics.median(spreads) if spreads else max(1e-9, *map(abs, self.values("reward/mean") or [1.0]))

    def reward_rose(self) -> bool:
        """Whether the reward rose noticeably from the first steps to the latest."""
        gain = self.reward_gain()
        return gain is not None and gain >= RISE


def first_and_last(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the medians of the first and of the last `WIDTH` values; None if these overlap."""
    if len(values) < 2 * WIDTH:
        return None
    return statistics.median(values[:WIDTH]), statistics.median(values[-WIDTH:])


def lowest_and_last(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the lowest median of `WIDTH` neighbours before the last `WIDTH` values, and the median
    of these; None if there are fewer than twice `WIDTH` values."""
    if len(values) < 2 * WIDTH:
        return None
    windows = [values[at : at + WIDTH] for at in range(len(values) - 2 * WIDTH + 1)]
    return min(statistics.median(window) for window in windows), statistics.median(values[-WIDTH:])


def scored(steps: Iterable[StepFacts]) -> list[EpisodeFacts]:
    """Return the scored episodes of some steps."""
    return [episode for facts in steps for group in facts.groups for episode in group]


def share(episodes: Sequence[EpisodeFacts], of: Callable[[EpisodeFacts], tuple[int, int]]) -> float | None:
    """Return the summed hits over the summed tries, where `of` returns both; None without a try."""
    pairs = [of(episode) for episode in episodes]
    tries = sum(count for count, _ in pairs)
    return sum(hits for _, hits in pairs) / tries if tries else None
