"""A real run's trace: scored again to the bit, exported and fine-tuned on, without false alarms."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from agentloop.trace.signals import signals_of

from .conftest import Background, Run


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


def test_rejection_sampling_in_two_commands(
    finished: Run, agentloop: Callable[..., Run], quickstart_model: Path, tmp_path: Path
) -> None:
    chosen = ("--format", "sft", "--min-reward", "1", "--out", "good.jsonl")
    exported = agentloop("trace", "export", str(finished.dir), *chosen)
    assert exported.code == 0, exported.err
    rows = [json.loads(line) for line in (tmp_path / "good.jsonl").read_text().splitlines()]
    assert rows and all(row["tools"] and row["reward"] == 1 for row in rows)

    stages = "stages=[{name: best, data: good.jsonl, steps: 2, batch_size: 4}]"
    (tmp_path / "sft.yaml").write_text(f"run: {{name: better}}\nmodel: {{path: {quickstart_model}}}\n")
    tuned = agentloop("sft", "--config", "sft.yaml", stages, name="better")
    assert tuned.code == 0, tuned.err
    assert (tuned.dir / "model" / "model.safetensors").is_file()
    # The model was trained towards such conversations: their loss is that of a model that knows them.
    losses = [row["loss"] for row in tuned.metrics if "loss" in row]
    assert losses and losses[-1] < 1.0


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


def test_a_run_killed_while_it_writes_can_be_shown_and_resumed(
    background: Callable[..., Background], quickstart: Callable[..., Run], agentloop: Callable[..., Run]
) -> None:
    killed = background("run.steps=4")
    killed.wait_for_steps(2)
    killed.kill()
    listed = agentloop("trace", "list", str(killed.dir), "--json")
    assert listed.code == 0, listed.err
    assert {row["step"] for row in json.loads(listed.out)["rows"]} >= {1}
    resumed = quickstart("run.steps=4", "--resume")
    assert resumed.code == 0, resumed.err
    after = json.loads(agentloop("trace", "list", str(killed.dir), "--split", "train", "--limit", "0", "--json").out)
    assert {row["step"] for row in after["rows"]} == {1, 2, 3, 4} and after["problems"] == []
