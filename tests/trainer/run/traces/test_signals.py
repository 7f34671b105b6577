"""Signals during a run: once, with a command that shows an episode; never the end of a run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from agentloop.trace.signals import SignalWatch
from tests.agentloop.trace.signals.support import GROUPS, SAMPLES, record, row
from trainer.console.console import Console
from trainer.run.traces import RunSignals


def collapsed(step: int) -> list[Any]:
    records = [record(step, group, sample) for group in range(GROUPS) for sample in range(SAMPLES)]
    for made in records:
        made.trajectory.answer = "42"
        made.trajectory.reward = 0.0
    return records


async def run(signals: RunSignals, steps: int = 12) -> None:
    for step in range(1, steps + 1):
        signals.add_row(row(step, reward__zero_std_share=1.0))
        await signals.look(step, collapsed(step))
    await signals.settle()


async def test_each_signal_is_said_once_with_the_command_that_shows_an_episode(tmp_path: Path) -> None:
    stream = io.StringIO()
    await run(RunSignals(tmp_path, Console(stream), lambda step: True))
    text = stream.getvalue()
    assert text.count("One answer is given to different tasks (step 5): 100% of the groups") == 1
    assert text.count("Groups without variance (step 5)") == 1
    assert f"agentloop trace show {tmp_path} train/" in text


@pytest.mark.parametrize("logged", [False, True])
async def test_episodes_that_fail_are_shown_by_a_command_of_this_run_and_a_file_that_is_there(
    tmp_path: Path, logged: bool
) -> None:
    run_dir, stream = tmp_path / "my run", io.StringIO()
    (run_dir / "logs").mkdir(parents=True)
    errors = run_dir / "logs" / "errors.jsonl"
    if logged:  # by exceptions of user code alone: a service that fails raises none
        errors.write_text("{}")
    signals = RunSignals(run_dir, Console(stream), lambda step: True)
    signals.add_row({"step": 1, "episode/count": 8, "episode/failed": 8})
    await signals.look(1, [])
    await signals.settle()
    text = stream.getvalue().replace("\n", " ")
    assert f"Read the errors: `agentloop trace list '{run_dir}' --status failed`" in text
    assert (str(errors) in text) == logged and ("errors.jsonl" in text) == logged


async def test_what_a_warning_of_the_step_said_is_not_said_again(tmp_path: Path) -> None:
    stream = io.StringIO()
    signals = RunSignals(tmp_path, Console(stream), lambda step: False)
    signals.said("equal rewards")
    signals.said("another warning")
    await run(signals)
    assert "without variance" not in stream.getvalue() and "One answer" in stream.getvalue()
    assert "trace show" not in stream.getvalue(), "an episode that no trace holds cannot be shown"


async def test_a_rule_that_breaks_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    signals = RunSignals(tmp_path, Console(stream), lambda step: True)

    def breaks(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(SignalWatch, "look", breaks)
    await run(signals)
    assert stream.getvalue().count("could not be judged: ZeroDivisionError: planted") == 1
