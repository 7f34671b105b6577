"""Traces lead to the episodes of the run that they were sent by."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from agentloop.trace.store import TraceStore
from tests.agentloop.trace.store.support import step_records
from tests.agentloop.viewer.api.conftest import Get, getter

IDS = {"first": "1" * 32, "second": "2" * 32}


@pytest.fixture
def ask(tmp_path: Path) -> Get:
    """Two runs of one name in different folders, with the same keys."""
    for folder, trace_id in IDS.items():
        records = step_records(1)
        records[2].trajectory.trace_id = trace_id
        run = tmp_path / folder
        (run / "config").mkdir(parents=True)
        (run / "config" / "resolved.json").write_bytes(orjson.dumps({"run": {"name": "lab"}}))
        TraceStore(run).write(1, "train", records)
    return getter(tmp_path)


async def test_a_trace_leads_to_its_episode_whatever_its_run_is_called(ask: Get) -> None:
    for folder, trace_id in IDS.items():
        found = (await ask(f"/api/traces/{trace_id}")).json()
        assert found == {"episodes": [{"run": folder, "name": "lab", "key": "train/1/g1/0/0"}], "indexing": False}


@pytest.mark.parametrize("trace_id", ["3" * 32, "0" * 32, "0199c1de-8a0b-7d27-8d2c-0d4f5e6a7b8c", "x"])
async def test_other_traces_lead_nowhere(ask: Get, trace_id: str) -> None:
    assert (await ask(f"/api/traces/{trace_id}")).json() == {"episodes": [], "indexing": False}


async def test_copies_of_a_run_are_all_named(ask: Get, tmp_path: Path) -> None:
    records = step_records(1)
    records[0].trajectory.trace_id = IDS["first"]
    TraceStore(tmp_path / "third").write(1, "train", records)
    (tmp_path / "third" / "metrics.jsonl").touch()
    found = (await ask(f"/api/traces/{IDS['first']}")).json()["episodes"]
    assert sorted((one["run"], one["name"]) for one in found) == [("first", "lab"), ("third", "third")]
