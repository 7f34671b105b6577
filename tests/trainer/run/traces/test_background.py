"""Traces are written beside the run: it goes on meanwhile, waits for the one before, and loses none."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from agentloop.config import TraceConfig
from agentloop.errors import DiskError
from agentloop.trace.store import TraceStore
from tests.agentloop.trace.store.support import step_records
from trainer.run.traces import RunTraces


class Disk:
    """A store whose writes wait until they are let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.writing, self.most = threading.Event(), 0, 0
        self.fail = False
        write = TraceStore.write

        def slow(store: TraceStore, *arguments: Any, **options: Any) -> Any:
            self.writing += 1
            self.most = max(self.most, self.writing)
            self.go.wait(30)
            self.writing -= 1
            if self.fail:
                raise DiskError("the disk is full")
            return write(store, *arguments, **options)

        monkeypatch.setattr(TraceStore, "write", slow)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def run_traces(run: Path, said: list[str] | None = None, **config: Any) -> RunTraces:
    notice = said.append if said is not None else pytest.fail
    return RunTraces(run, TraceConfig.model_validate(config), seed=0, total_steps=9, notice=notice)


def test_the_first_and_the_last_step_are_always_traced(tmp_path: Path) -> None:
    assert [step for step in range(1, 10) if run_traces(tmp_path, train_every=4).due(step)] == [1, 4, 8, 9]


async def test_the_run_goes_on_while_a_trace_is_written(tmp_path: Path, disk: Disk) -> None:
    traces = run_traces(tmp_path)
    await traces.write(1, "train", step_records(1))
    assert TraceStore(tmp_path).steps("train") == [], "the write waits, and the run does not"
    next_one = asyncio.create_task(traces.write(2, "train", step_records(2)))
    await asyncio.sleep(0.05)
    assert not next_one.done(), "one at a time: the second waits for the first"
    disk.go.set()
    await next_one
    await traces.settle()
    assert TraceStore(tmp_path).steps("train") == [1, 2]


async def test_a_background_evaluation_and_a_step_can_end_together(tmp_path: Path, disk: Disk) -> None:
    traces = run_traces(tmp_path)
    await traces.write(1, "train", step_records(1))
    both = [asyncio.create_task(traces.write(step, "train", step_records(step))) for step in (2, 3)]
    await asyncio.sleep(0.05)
    disk.go.set()
    await asyncio.gather(*both)
    await traces.settle()
    assert TraceStore(tmp_path).steps("train") == [1, 2, 3] and disk.most == 1


async def test_a_stopped_run_waits_for_what_it_is_writing(tmp_path: Path, disk: Disk) -> None:
    traces = run_traces(tmp_path)
    await traces.write(1, "train", step_records(1))
    waiting = asyncio.create_task(traces.settle())
    await asyncio.sleep(0)
    waiting.cancel()  # Ctrl-C
    with pytest.raises(asyncio.CancelledError):
        await waiting
    disk.go.set()
    await traces.close()
    assert TraceStore(tmp_path).steps("train") == [1]


async def test_a_trace_that_cannot_be_written_is_an_error_once(tmp_path: Path, disk: Disk) -> None:
    disk.fail = True
    disk.go.set()
    traces = run_traces(tmp_path)
    await traces.write(1, "train", step_records(1))
    with pytest.raises(DiskError, match="the disk is full"):
        await traces.write(2, "train", step_records(2))
    await traces.settle()
    await traces.close()


async def test_what_is_left_out_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    traces = run_traces(tmp_path, said, max_bytes_per_step=1)
    for step in (1, 2, 3):
        await traces.write(step, "train", step_records(step, failed={(0, 0)}))
    await traces.settle()
    assert len(said) == 1 and "step_1/train.parquet leaves out 4 groups (7 episodes)" in said[0]
    assert "trace.max_bytes_per_step is 1" in said[0]
    assert [len(TraceStore(tmp_path).records(step, "train")) for step in (1, 2, 3)] == [1, 1, 1]
