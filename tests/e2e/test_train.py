"""The main job, end to end: it runs, learns, is exact, and survives what happens to processes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from .conftest import FINISHED_STEPS, Run

STEPS = f"run.steps={FINISHED_STEPS}"


def test_a_run_writes_the_whole_run_directory(finished: Run) -> None:
    run = finished
    for name in ("config/resolved.json", "env.json", "metrics.jsonl", "logs/server.log", "report.html"):
        assert (run.dir / name).is_file(), name
    assert [row["step"] for row in run.train_metrics] == [1, 2, 3]
    assert (run.dir / "weights" / "v_3" / "model.safetensors").is_file()
    assert (run.dir / "checkpoints" / "step_3" / "state.json").is_file()
    wanted = set(
        [
            "step",
            "version",
            "reward/mean",
            "reward/std",
            "episode/turns_mean",
            "episode/tool_calls_mean",
            "episode/failed",
            "rollout/tokens",
            "rollout/tokens_per_s",
            "rollout/time_s",
            "train/tokens",
            "train/tokens_per_s",
            "train/time_s",
            "train/loss",
            "train/grad_norm",
            "train/entropy",
            "train/kl_ref",
            "train/clip_frac",
            "mismatch/logprob_abs_mean",
            "mismatch/k3",
            "staleness/max",
            "publish/time_s",
            "step/time_s",
        ]
    )
    assert wanted <= run.train_metrics[0].keys()
    assert "eval/reward_mean" in run.metrics[0] and "eval/reward_mean" in run.metrics[-1]
    assert "\x1b" not in run.out, "no control codes when the output is not a terminal"
    assert not list(run.dir.rglob("*.tmp"))


def test_every_step_is_on_policy_and_exact(finished: Run) -> None:
    run = finished
    for row in run.train_metrics:
        assert row["mismatch/logprob_abs_mean"] <= 1e-5
        assert row["staleness/max"] == 0
        assert row["episode/failed"] == 0 and row["episode/rejected"] == 0
    for step in (1, 2, 3):
        for line in run.trace(step):
            assert {v for v in line["versions"] if v is not None} == {step - 1}


@pytest.mark.slow
def test_the_quickstart_learns_to_call_the_tool(quickstart: Any) -> None:
    run = quickstart("run.steps=16", "eval.max_rows=128", "eval.every=16", small=False, timeout=400)
    assert run.code == 0, run.err
    rewards = [row["reward/mean"] for row in run.train_metrics]
    calls = [row["episode/tool_calls_mean"] for row in run.train_metrics]
    evals = [row["eval/reward_mean"] for row in run.metrics if row.get("eval/reward_mean") is not None]
    assert sum(rewards[:3]) / 3 <= 0.40
    assert sum(rewards[-3:]) / 3 >= 0.70
    assert calls[-1] > 0.85 > 0.5 > calls[0]
    assert evals[0] < 0.1 and evals[-1] > 0.7


def test_a_directory_that_holds_a_run_is_refused(finished: Run, refused: Any, tmp_path: Path) -> None:
    shutil.copytree(finished.dir, tmp_path / "outputs" / "run")
    again = refused("run.steps=1")
    assert again.code == 2
    assert again.metrics == finished.metrics, "nothing of it is lost"
    assert "--resume" in again.err and "run.name" in again.err


def test_ctrl_c_before_the_first_step_leaves_nothing_behind(background: Any) -> None:
    run = background("run.steps=5")
    deadline = time.monotonic() + 60
    while not (children := run.children("rollout_server", "trainer.learner.process")) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.interrupt()
    code, out = run.finish()
    assert code == 130, out
    assert "Traceback" not in out and "agentloop train --config" in out
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_a_killed_server_is_started_again_and_nothing_is_lost(background: Any) -> None:
    run = background("run.steps=3", "rollout.batch_size=16", "eval.before_train=false", "eval.every=null")
    run.wait_for_steps(1)
    time.sleep(0.1)
    (server,) = run.children("rollout_server")
    server.kill()
    code, out = run.finish()
    assert code == 0, out
    assert "restarting it" in out
    rows = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["episode/failed"] == 0 and row["episode/count"] == 64 for row in rows)
    assert all(row["mismatch/logprob_abs_mean"] <= 1e-5 for row in rows)


def test_kill_of_the_run_leaves_no_process_behind(background: Any) -> None:
    run = background("run.steps=100000", "eval.before_train=false")
    run.wait_for_steps(1)
    children = run.children("rollout_server", "trainer.learner.process")
    run.process.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        alive = [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return
        time.sleep(0.1)
    raise AssertionError(f"left behind: {alive}")


def test_two_ranks_train_with_the_same_code(finished: Run, quickstart: Any) -> None:
    two = quickstart(STEPS, "eval.before_train=false", "eval.every=null", "trainer.ranks=2")
    assert two.code == 0, two.err
    for a, b in zip(finished.train_metrics, two.train_metrics, strict=True):
        assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], rel=1e-3)
        assert b["mismatch/logprob_abs_mean"] <= 1e-5


def test_staleness_stays_within_its_bound(quickstart: Any) -> None:
    run = quickstart("run.steps=4", "rollout.max_staleness=2", "eval.before_train=false", "eval.every=null")
    assert run.code == 0, run.err
    assert all(row["staleness/max"] <= 2 for row in run.train_metrics)
    assert any(row["staleness/max"] > 0 for row in run.train_metrics)


def test_evaluation_only(quickstart: Any) -> None:
    run = quickstart("eval.only=true", "run.steps=5")
    assert run.code == 0, run.err
    assert [row["step"] for row in run.metrics] == [0]
    assert (run.dir / "traces" / "step_0" / "eval.parquet").is_file()


def test_real_gsm8k_rows_run_to_the_end(agentloop: Any, repo: Path, shared: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in (shared / "data" / "gsm8k").glob("*.jsonl"):
        lines = file.read_text().splitlines(keepends=True)
        (source / file.name).write_text("".join(lines[:256]))
    prepared = agentloop("prepare", "gsm8k", "--source", str(source), "--out", str(tmp_path / "gsm8k"))
    assert prepared.code == 0, prepared.err
    run = agentloop(
        "train", "--config", str(repo / "recipes/gsm8k/smoke.yaml"), "run.steps=2",
        f"data.train={tmp_path / 'gsm8k/train.parquet'}", f"data.val={tmp_path / 'gsm8k/test.parquet'}",
        "rollout.batch_size=4", "rollout.group_size=2", "eval.max_rows=4", "run.name=run",
    )  # fmt: skip
    assert run.code == 0, run.err + run.out
    questions = {json.loads(line)["question"] for line in (source / "train.jsonl").read_text().splitlines()}
    for step in (1, 2):
        for line in run.trace(step):
            user = next(m for m in line["messages"] if m["role"] == "user")
            assert any(question in user["content"] for question in questions)


def test_dry_run_prints_the_resolved_configuration(quickstart: Any) -> None:
    run = quickstart("--dry-run", "seed=5")
    assert run.code == 0
    assert json.loads(run.out)["seed"] == 5
    assert not run.dir.exists()


@pytest.mark.parametrize("transport", ["shm", "distributed"])
def test_every_transport_gives_the_same_run_and_leaves_nothing_in_memory(
    finished: Run, quickstart: Any, transport: str, tmp_path: Path
) -> None:
    memory = tmp_path / "memory"
    other = quickstart(
        STEPS, "eval.before_train=false", "eval.every=null",
        f"rollout.publish.transport={transport}", f"rollout.publish.folder={memory}",
    )  # fmt: skip
    assert other.code == 0, other.err
    for key in ("reward/mean", "rollout/tokens"):
        assert [r[key] for r in other.train_metrics] == [r[key] for r in finished.train_metrics], key
    assert not list(memory.iterdir())
    assert sorted(path.name for path in (other.dir / "weights").iterdir()) == ["v_3"]
    assert (other.dir / "weights" / "v_3" / "config.json").exists()
