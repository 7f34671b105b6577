"""The report of a run whose traces are parquet: the same parts as of old JSON lines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentloop.report import write_report
from agentloop.report.reading import RunRecord
from agentloop.trace.record import TraceRecord
from agentloop.trace.store import TraceStore
from agentloop.trace.store.old_form import convert, old_files
from agentloop.types import EpisodeStatus, Trajectory
from tests.agentloop.trace.store.support import step_records

HOSTILE = "<script>window.hacked = 1</script>\x1b[31m\u202e"


def test_a_converted_run_has_the_same_report_as_its_old_form(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", 8)
    for path in run.glob("traces/*/*.jsonl"):  # parquet has no pieces: the tokenizer decodes the ids
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "pieces"}) + "\n" for line in lines))
    before = write_report(run).read_text(encoding="utf-8")
    store = TraceStore(run)
    for file in old_files(store.folder):
        convert(store, file)
        file.path.unlink()
    after = write_report(run).read_text(encoding="utf-8")
    old_form = r'  <p class="lead">Trace: [^\n]*old JSON form[^\n]*</p>\n'
    assert re.search(old_form, before)
    assert _parts(re.sub(old_form, "", before)) == _parts(after)


def _parts(html: str) -> list[str]:
    return [line for line in html.splitlines() if line.strip() and "nonce" not in line]


def test_failures_and_broken_trajectories_are_shown(tmp_path: Path) -> None:
    store = TraceStore(tmp_path)
    for step in (1, 2):
        records = step_records(step, failed={(0, 0), (1, 1)})
        broken: Any = Trajectory([1, 2, 3], [0, 1], [None], [None, 3, 3], 1, group_id="g9", task_id="broken")
        broken.status, broken.error = EpisodeStatus.REJECTED, f"logprobs has 1 entries for 3 token ids {HOSTILE}"
        store.write(step, "train", [*records, TraceRecord(step, "train", step - 1, 0, 1, broken)])
    record = RunRecord.read(tmp_path)
    assert [len(record.trajectories(step, "train")) for step in (1, 2, 3)] == [9, 9, 0]
    shown = record.trajectories(2, "train")[-1]
    assert shown.token_ids == [1, 2, 3] and shown.mask == [False, True, False] and shown.versions == [None, 3, 3]
    found, complete = record.unhealthy()
    assert complete and [(t.status, t.step, t.task_id) for t in found] == [
        (status, step, task)
        for step in (1, 2)
        for status, task in (("failed", "row-g0"), ("failed", "row-g1"), ("rejected", "broken"))
    ]
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "server lost" in html and "logprobs has 1 entries" in html and "<script>window" not in html


def test_samples_are_chosen_from_the_first_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentloop.report.reading.READ_TOKENS", 200)
    TraceStore(tmp_path).write(1, "train", step_records(1))
    assert len(RunRecord.read(tmp_path).trajectories(1, "train")) == 4
