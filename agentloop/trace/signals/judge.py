"""Apply every rule: to a run directory, or after each step of a run."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import orjson

from agentloop.text import finite
from agentloop.trace.record import TraceRecord
from agentloop.trace.signals import groups, lengths, mismatch, repetition, rewards
from agentloop.trace.signals.evidence import WIDTH, Evidence, Row
from agentloop.trace.signals.facts import StepFacts, facts_of
from agentloop.trace.signals.table import Signal

FUNCTIONS: tuple[Callable[[Evidence], Signal | None], ...] = (
    rewards.reward_without_eval,
    rewards.format_reward,
    lengths.length_runaway,
    lengths.calls_runaway,
    repetition.repeated_answer,
    repetition.repeated_call,
    repetition.call_loop,
    repetition.fewer_answers,
    groups.equal_groups,
    lengths.length_stops,
    lengths.tool_failures,
    lengths.failed_episodes,
    mismatch.mismatch_growth,
    mismatch.mismatch_by_turn,
    mismatch.mismatch_by_position,
    mismatch.mismatch_by_token,
    groups.stale_groups,
)
"""The function of each rule, in the order of the table."""


def judge(evidence: Evidence) -> list[Signal]:
    """Return what looks wrong: warnings first, each in the order of the table."""
    found = []
    with np.errstate(all="ignore"):
        for rule in FUNCTIONS:
            # A rule says nothing about numbers whose sums no float holds.
            with contextlib.suppress(ArithmeticError, np.linalg.LinAlgError):
                if (signal := rule(evidence)) is not None and math.isfinite(signal.value):
                    found.append(signal)
    return sorted(found, key=lambda signal: signal.severity != "warning")


def signals_of(run_dir: Path) -> list[Signal]:
    """Return what looks wrong in a run as it stands now.

    Reads `metrics.jsonl` and the records of ten steps at most, of each up to
    `facts.MOST_EPISODES` episodes. A file that is missing or cut is left out.
    """
    return judge(read_evidence(run_dir))


def signals_and_note(run_dir: Path) -> tuple[list[Signal], str]:
    """Return what looks wrong, and why some rules could not judge yet; empty if all could."""
    evidence = read_evidence(run_dir)
    return judge(evidence), unjudged(evidence)


def unjudged(evidence: Evidence) -> str:
    """Return a sentence about the rules that need more steps than there are; empty without any."""
    steps = max(len(evidence.train), len(evidence.steps))
    if steps >= 2 * WIDTH or (not steps and evidence.rows):  # SFT has neither rewards nor episodes
        return ""
    if steps < WIDTH:
        return f"Too few steps to judge ({WIDTH} needed, {steps} so far)"
    return f"Too few steps to compare the end with the beginning ({2 * WIDTH} needed, {steps} so far)"


def read_evidence(run_dir: Path) -> Evidence:
    """Read the metrics of a run and the facts of its first and latest recorded steps."""
    from agentloop.trace.store import TraceStore  # pyarrow: a run of SFT has no traces

    store = TraceStore(run_dir)
    steps = store.steps("train")
    facts = []
    for step in sorted({*steps[:WIDTH], *steps[-WIDTH:]}):
        try:
            facts.append(facts_of(step, store.iterate(step, "train")))
        except Exception:  # noqa: BLE001, S112  # a file of another program may hold anything
            continue
    return Evidence(read_rows(run_dir / "metrics.jsonl"), facts, run_dir)


def read_rows(path: Path) -> list[Row]:
    """Return the lines of `metrics.jsonl` that can be read, one a step, in order of the steps."""
    merged: dict[int, dict[str, object]] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(row, dict) and (step := finite(row.get("step"))) is not None:
            merged.setdefault(int(step), {}).update(row)
    return [merged[step] for step in sorted(merged)]


class SignalWatch:
    """Judge a run after each of its steps; return each rule's signal once.

    `add_row` is cheap. `look` reads a step's records: call it from a thread.

    Args:
        run_dir: of the run, for sentences that name it; None: unknown.
        resume: read what the run has recorded so far.
    """

    def __init__(self, run_dir: Path | None = None, *, resume: bool = True) -> None:
        before = read_evidence(run_dir) if run_dir is not None and resume else Evidence([])
        self._run_dir = run_dir
        self._rows: dict[int, dict[str, object]] = {int(row["step"]): dict(row) for row in before.rows}
        self._steps: list[StepFacts] = list(before.steps)
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def add_row(self, row: Row) -> None:
        """Add a line of `metrics.jsonl`; an evaluation may add to the row of an earlier step."""
        with self._lock:
            self._rows.setdefault(int(row["step"]), {}).update(row)

    def said(self, rule: str) -> None:
        """Do not return a rule's signal: the same has been said in other words."""
        self._said.add(rule)

    def look(self, step: int, records: Iterable[TraceRecord]) -> list[Signal]:
        """Add the training records of a step; return the signals of rules that fire for the first
        time."""
        facts = facts_of(step, records)
        if facts.episodes:
            self._steps = [*(old for old in self._steps if old.step != step), facts]
            self._steps = [*self._steps[:WIDTH], *self._steps[WIDTH:][-WIDTH:]]
        with self._lock:
            # The next step may have added its row already: what is said must not depend on timing.
            rows = [dict(self._rows[number]) for number in sorted(self._rows) if number <= step]
        new = [signal for signal in judge(Evidence(rows, self._steps, self._run_dir)) if signal.rule not in self._said]
        self._said.update(signal.rule for signal in new)
        return new
