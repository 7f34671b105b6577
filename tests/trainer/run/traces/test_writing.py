"""A step's trace is written with its place in the index, so that a viewer opens at once."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from agentloop.config import TraceConfig
from agentloop.trace.index import TraceIndex
from agentloop.trace.index.database import NAME
from agentloop.trace.sender import SpanSender
from agentloop.trace.store import TraceStore
from tests.agentloop.trace.store.support import step_records
from trainer.run.traces import RunTraces


async def write(run: Path, *steps: int) -> None:
    traces = RunTraces(run, TraceConfig.model_validate({}), seed=0, total_steps=9, notice=lambda text: None)
    for step in steps:
        await traces.write(step, "train", step_records(step))
    await traces.settle()
    await traces.close()


async def test_the_run_indexes_what_it_wrote(tmp_path: Path, monkeypatch: Any) -> None:
    await write(tmp_path, 1, 2)
    monkeypatch.setattr("agentloop.trace.index.index.read_rows", None)  # a viewer has nothing left to read
    index = TraceIndex(tmp_path)
    assert not index.refresh()
    assert index.query().total == 16


async def test_a_broken_index_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "traces" / NAME).mkdir(parents=True)
    await write(tmp_path, 1, 2)
    assert TraceStore(tmp_path).steps("train") == [1, 2]


async def test_an_index_that_a_viewer_of_another_version_made_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(index: TraceIndex, step: int, split: str) -> None:
        raise sqlite3.IntegrityError("NOT NULL constraint failed: episodes.class")

    monkeypatch.setattr(TraceIndex, "add", add)
    traces = RunTraces(tmp_path, TraceConfig.model_validate({}), seed=0, total_steps=9, notice=lambda text: None)
    await traces.write(1, "train", step_records(1))
    await traces.settle()
    assert TraceStore(tmp_path).steps("train") == [1]


class Sender(SpanSender):
    """Notes whether the file that it is given is there."""

    def __init__(self, run: Path, *, active: bool) -> None:
        self._store, self._active = TraceStore(run), active
        self.got: list[tuple[int, str, int]] = []
        self.reports = 0

    @property
    def active(self) -> bool:
        return self._active

    def submit(self, step: int, split: str) -> None:
        self.got.append((step, split, len(self._store.records(step, split))))

    def report(self) -> None:
        self.reports += 1


@pytest.mark.parametrize("active", [True, False], ids=["destinations", "none"])
async def test_a_written_step_is_named_to_the_sender_which_also_indexes_it(tmp_path: Path, active: bool) -> None:
    sender = Sender(tmp_path, active=active)
    config = TraceConfig.model_validate({})
    traces = RunTraces(tmp_path, config, seed=0, total_steps=9, notice=lambda text: None, sender=sender)
    for step in (1, 2):
        await traces.write(step, "train", step_records(step))
    await traces.settle()
    await traces.close()
    assert sender.got == ([(1, "train", 8), (2, "train", 8)] if active else []) and sender.reports == 3
    assert (tmp_path / "traces" / NAME).exists() is not active


@pytest.mark.parametrize("active", [True, False], ids=["destinations", "none"])
async def test_a_resumed_run_names_the_steps_that_are_there_to_the_sender(tmp_path: Path, active: bool) -> None:
    await write(tmp_path, 1, 2, 3)
    TraceStore(tmp_path).rewind(2)
    sender = Sender(tmp_path, active=active)
    config = TraceConfig.model_validate({})
    traces = RunTraces(tmp_path, config, seed=0, total_steps=9, notice=lambda text: None, sender=sender)
    traces.resume()
    await traces.close()
    assert sender.got == ([(1, "train", 8), (2, "train", 8)] if active else [])
