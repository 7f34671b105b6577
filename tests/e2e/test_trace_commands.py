"""A real run's trace: scored again to the bit, shown when a part of it is damaged, without false alarms."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from agentloop.trace.signals import signals_of

from .conftest import Run


def test_the_runs_own_reward_gives_the_stored_rewards_to_the_bit(
    finished: Run, agentloop: Callable[..., Run], tmp_path: Path
) -> None:
    for split in ("train", "eval"):
        out = tmp_path / f"{split}.jsonl"
        done = agentloop("trace", "rescore", str(finished.dir), "--split", split, "--json", "--out", str(out))
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert found["compared"] == found["episodes"] > 0 and found["changed"] == found["failed"] == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["new"] for row in rows] == [row["old"] for row in rows]
        assert {row["old"] for row in rows} == {0.0, 1.0} or split == "eval"


def test_a_healthy_run_has_no_signals(finished: Run) -> None:
    assert signals_of(finished.dir) == []
    assert "Traceback" not in finished.out + finished.err and "signals" not in finished.out


def test_a_trace_that_a_kill_cut_is_named_and_the_rest_is_shown(
    finished: Run, agentloop: Callable[..., Run], tmp_path: Path
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(finished.dir, run, ignore=shutil.ignore_patterns("weights", "checkpoints"))
    path = run / "traces" / "step_2" / "train.parquet"
    os.truncate(path, path.stat().st_size // 2)
    (path.parent / "eval.parquet.tmp").write_bytes(b"PAR1")

    listed = agentloop("trace", "list", str(run), "--split", "train", "--json")
    assert listed.code == 0
    found = json.loads(listed.out)
    assert {row["step"] for row in found["rows"]} == {1, 3}
    assert len(found["problems"]) == 2 and all("step_2" in problem for problem in found["problems"])

    key = found["rows"][0]["key"]
    assert agentloop("trace", "show", str(run), key).code == 0
    cut = agentloop("trace", "show", str(run), key.replace("train/3/", "train/2/"))
    assert cut.code == 2 and "cut or damaged" in cut.err and "Traceback" not in cut.err
    assert agentloop("report", str(run)).code == 0
