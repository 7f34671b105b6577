"""Say during a run what looks wrong in it (`agentloop.trace.signals`), each thing once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentloop.trace.record import RecordKey, TraceRecord
from agentloop.trace.signals import Signal, SignalWatch
from trainer.console.console import Console

SAME = {"equal rewards": "equal_groups", "mismatch": "mismatch_growth"}
"""Warnings of a step (`notices`) that say what a rule of the signals says later."""


class RunSignals:
    """The signals of one run: judged in a thread after each step, while the next one runs.

    Args:
        run_dir: for the command that shows an episode.
        traced: whether a step's trace is written, so that its episodes can be shown.
    """

    def __init__(self, run_dir: Path, console: Console, traced: Callable[[int], bool]) -> None:
        self._run_dir = run_dir
        self._console = console
        self._traced = traced
        self._watch = SignalWatch(run_dir, resume=False)
        self._looking: asyncio.Task[None] | None = None
        self._broken = False

    async def resume(self) -> None:
        """Read what the run has recorded so far."""
        try:
            self._watch = await asyncio.to_thread(SignalWatch, self._run_dir)
        except Exception as exc:  # noqa: BLE001  # a diagnosis must not end a run
            self._console.warn(f"signals: the steps before are left out: {type(exc).__name__}: {exc}")

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Add a line of `metrics.jsonl`."""
        self._watch.add_row(row)

    def said(self, warning: str) -> None:
        """Do not say again, as a signal, what a warning of a step has said."""
        if warning in SAME:
            self._watch.said(SAME[warning])

    async def look(self, step: int, records: Sequence[TraceRecord]) -> None:
        """Begin to judge a step, after the one before it is judged."""
        await self.settle()
        self._looking = asyncio.create_task(self._look(step, records), name=f"signals of step {step}")

    async def settle(self) -> None:
        """Wait until the last step is judged."""
        if self._looking is not None:
            await asyncio.shield(self._looking)

    async def _look(self, step: int, records: Sequence[TraceRecord]) -> None:
        try:
            found = await asyncio.to_thread(self._watch.look, step, records)
        except Exception as exc:  # noqa: BLE001  # a diagnosis must not end a run
            if not self._broken:
                self._broken = True
                self._console.warn(f"signals of step {step} could not be judged: {type(exc).__name__}: {exc}")
            return
        for signal in found:
            say = self._console.warn if signal.severity == "warning" else self._console.notice
            say(self._text(signal))

    def _text(self, signal: Signal) -> str:
        """Return a signal's sentence, and the command that shows an episode behind it."""
        shown = [key for key in signal.keys if self._traced(RecordKey.parse(key).step)]
        example = f"\n  for example `agentloop trace show {self._run_dir} {shown[0]}`" if shown else ""
        return f"{signal.title} (step {signal.step}): {signal.sentence}{example}"
