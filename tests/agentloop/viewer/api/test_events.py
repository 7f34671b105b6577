"""Events of a run as it goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agentloop.trace.store import TraceStore
from agentloop.viewer.api import events as module
from agentloop.viewer.api.events import Events
from agentloop.viewer.api.runs import Runs
from agentloop.web.refusals import Refusal
from tests.agentloop.trace.store.support import step_records


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.02)
    monkeypatch.setattr("agentloop.viewer.api.runs.SEARCH_EVERY_S", 0.0)


async def read(stream: AsyncIterator[bytes]) -> dict[str, Any]:
    """Return the next event, without comments."""
    async with asyncio.timeout(20):
        async for block in stream:
            lines = dict(line.split(": ", 1) for line in block.decode().splitlines() if line and line[0] != ":")
            if "data" in lines:
                event: dict[str, Any] = json.loads(lines["data"])
                assert lines["event"] == event["kind"]
                return event
    raise AssertionError("the stream ended")


async def started(events: Events) -> AsyncIterator[bytes]:
    """Return a stream whose watcher has looked once."""
    stream = events.subscribe()
    assert (await anext(stream)).startswith(b"retry:")
    await asyncio.sleep(0.2)
    return stream


def step(run: Path, number: int) -> None:
    run.mkdir(exist_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": number, "reward/mean": 0.5}) + "\n")


async def test_steps_traces_ends_and_new_runs_are_told(tmp_path: Path) -> None:
    run = tmp_path / "one"
    step(run, 1)
    stream = await started(Events(Runs([tmp_path])))
    step(run, 2)
    assert await read(stream) == {"run": "one", "kind": "step", "step": 2}
    TraceStore(run).write(2, "train", step_records(2, groups=1))
    told = await read(stream)
    assert told == {"run": "one", "kind": "step", "step": 2}
    (run / "finished.json").write_text('{"steps": 2}')
    while (event := await read(stream)) == told:  # its folder, then its file
        pass
    assert event == {"run": "one", "kind": "finished", "step": 2}
    step(tmp_path / "two", 1)
    assert await read(stream) == {"run": "two", "kind": "run", "step": 1}
    (tmp_path / "two" / "metrics.jsonl").unlink()
    assert await read(stream) == {"run": "two", "kind": "run", "step": None}


async def test_all_readers_share_one_watcher_that_ends_with_the_last(tmp_path: Path) -> None:
    events = Events(Runs([tmp_path]))
    streams = [await started(events) for _ in range(3)]
    watcher = events._watcher
    step(tmp_path / "one", 1)
    for stream in streams:
        assert (await read(stream))["run"] == "one"
    assert events._watcher is watcher is not None
    for stream in streams:
        await stream.aclose()  # type: ignore[attr-defined]
    await asyncio.wait_for(watcher, 20)
    assert (await read_after(events, tmp_path))["run"] == "two"


async def read_after(events: Events, root: Path) -> dict[str, Any]:
    stream = await started(events)
    step(root / "two", 1)
    return await read(stream)


async def test_a_slow_reader_is_told_to_load_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 3)
    events = Events(Runs([tmp_path]))
    stream = await started(events)
    for number in range(5):
        events.publish({"run": "one", "kind": "step", "step": number})
    assert await read(stream) == {"run": None, "kind": "run", "step": None}
    assert await read(stream) == {"run": "one", "kind": "step", "step": 4}


async def test_readers_are_bounded_and_connections_are_kept_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_READERS", 1)
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.05)
    events = Events(Runs([tmp_path]))
    stream = await started(events)
    with pytest.raises(Refusal) as refused:
        events.subscribe()
    assert refused.value.status == 503
    assert (await asyncio.wait_for(anext(stream), 20)).startswith(b":")
    await stream.aclose()  # type: ignore[attr-defined]
    events.subscribe()


async def test_a_watcher_survives_a_run_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(Runs([tmp_path]))
    stream = await started(events)
    real, failures = events._look, iter([OSError("gone")])

    def look() -> Any:
        for failure in failures:
            raise failure
        return real()

    monkeypatch.setattr(events, "_look", look)
    step(tmp_path / "one", 1)
    assert (await read(stream))["run"] == "one"


async def test_calls_of_other_programs_are_told(tmp_path: Path) -> None:
    arrived = 0
    stream = await started(Events(Runs([tmp_path]), lambda: arrived))
    arrived = 3
    assert await read(stream) == {"run": None, "kind": "call", "step": None}
