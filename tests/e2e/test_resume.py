"""A run that was killed and resumed is, to the bit, the run that was never stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentloop.trace.store import TraceStore
from trainer.run.control import ask

from .conftest import Run, train_quickstart, waiting_reward

STEPS = 5
OPTIONS = (f"run.steps={STEPS}", "checkpoint.every=2", "eval.every=2", "rollout.max_running=12")


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics but those of time."""
    ends = ("time_s", "tokens_per_s", "wait_s")
    return [{k: v for k, v in row.items() if not k.endswith(ends) and "lag" not in k} for row in rows]


def weights_digest(run_dir: Path, version: int) -> str:
    return hashlib.sha256((run_dir / "weights" / f"v_{version}" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(repo: Path, tmp_path_factory: pytest.TempPathFactory, run_forked: Callable[..., Run]) -> Run:
    """The run that was never stopped."""
    run = run_forked(tmp_path_factory.mktemp("whole"), *train_quickstart(repo, "run", OPTIONS))
    assert run.code == 0, run.err
    return run


@pytest.mark.slow
def test_killed_at_random_points_and_resumed_it_is_the_same_run_to_the_bit(
    whole: Run, quickstart: Any, background: Any, agentloop: Any
) -> None:
    seed = int(os.environ.get("RESUME_SEED", time.time_ns() % 2**32))
    print(f"RESUME_SEED={seed}")
    rng = random.Random(seed)

    for number, step in enumerate(sorted(rng.sample(range(STEPS), 3))):
        run = background(*OPTIONS, *(["--resume"] if number else []))
        run.wait_for_steps(step)
        time.sleep(rng.random() * 0.6)
        run.kill()
        if step > 0:  # its traces can be shown
            listed = agentloop("trace", "list", str(run.dir), "--limit", "0", "--json")
            assert listed.code == 0, listed.err
            assert {row["step"] for row in json.loads(listed.out)["rows"]} >= set(range(1, step))
    (run.dir / "finished.json").unlink(missing_ok=True)  # as if the last kill had come before it was written
    rest = quickstart(*OPTIONS, "--resume", "rollout.replicas=2")  # who samples makes no difference either
    assert rest.code == 0, rest.err
    assert "changed since the run was started: rollout.replicas: 1 -> 2" in rest.out
    assert without_times(rest.metrics) == without_times(whole.metrics)
    assert [row["step"] for row in rest.metrics] == list(range(STEPS + 1))
    after = json.loads(agentloop("trace", "list", str(rest.dir), "--split", "train", "--limit", "0", "--json").out)
    assert {row["step"] for row in after["rows"]} == set(range(1, STEPS + 1)) and after["problems"] == []
    assert weights_digest(rest.dir, STEPS) == weights_digest(whole.dir, STEPS)

    # As if it had been killed after its last checkpoint: there is no step left that would publish.
    shutil.rmtree(rest.dir / "weights")
    (rest.dir / "finished.json").unlink()
    assert quickstart(*OPTIONS, "--resume").code == 0
    assert weights_digest(rest.dir, STEPS) == weights_digest(whole.dir, STEPS)


def test_at_learning_rate_zero_nothing_moves_over_twenty_publishes(quickstart: Any) -> None:
    run = quickstart(
        "run.steps=20", "trainer.optim.lr=0", "eval.every=1", "eval.max_rows=6", "eval.sampling.temperature=1",
        "checkpoint.every=null", "trace.train_every=20", "rollout.group_size=2",
    )  # fmt: skip
    assert run.code == 0, run.err
    assert [row["version"] for row in run.train_metrics] == list(range(1, 21))
    # The same requests under the same weights: whatever a publish does to a weight would show in them.
    assert len({(row["eval/reward_mean"], row["eval/response_tokens_mean"]) for row in run.metrics}) == 1
    evaluated = [[(line["token_ids"], line["logprobs"]) for line in run.trace(step, "eval")] for step in range(21)]
    assert all(generations == evaluated[0] for generations in evaluated)
    assert max(row["mismatch/logprob_abs_mean"] for row in run.train_metrics) < 1e-5


def test_ctrl_c_during_an_evaluation_loses_neither_the_step_nor_the_evaluation(
    whole: Run, quickstart: Any, background: Any, repo: Path, tmp_path: Path
) -> None:
    # An evaluation of 8 episodes, two steps of 16, and the fourth of the next evaluation never ends.
    slow = waiting_reward(repo, tmp_path, calls=8 + 2 * 16 + 3)
    run = background(*OPTIONS, slow)
    deadline = time.monotonic() + 120
    while not (tmp_path / "waits").exists():
        assert run.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(120) == 130
    (tmp_path / "go").touch()

    rest = quickstart(*OPTIONS, slow, "--resume")
    assert rest.code == 0, rest.err
    assert without_times(rest.metrics) == without_times(whole.metrics)
    assert [row["step"] for row in rest.metrics if "eval/reward_mean" in row] == [0, 2, 4, 5]
    for step in range(1, STEPS + 1):
        ours, theirs = rest.trace(step), whole.trace(step)
        assert [(line["token_ids"], line["reward"]) for line in ours] == [
            (line["token_ids"], line["reward"]) for line in theirs
        ]


@pytest.mark.slow
def test_agent_workers_and_replicas_that_die_join_and_leave_change_nothing(whole: Run, background: Any) -> None:
    run = background(*OPTIONS, "rollout.replicas=2", "cluster.agents.workers=2")
    scaled = [{"rollout": 3, "agents": 3}, {"rollout": 1, "agents": 1}, {"rollout": 2}, {"agents": 2}]
    for step, parts in enumerate(scaled, 1):
        run.wait_for_steps(step)
        assert len(ask(run.dir, "scale", **parts)) == len(parts)
        victims = run.children("agentloop.worker")
        with contextlib.suppress(psutil.NoSuchProcess):
            victims[step % len(victims)].kill()
    code, out = run.finish()
    assert code == 0, out
    assert "was killed (SIGKILL" in out and "it is started again" in out
    assert "agentloop cluster scale: rollout: 1 replica;" in out and "agents: 3 workers" in out

    metrics = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["workers/restarts"] >= 1
    rows = [{key: value for key, value in row.items() if not key.startswith("workers/")} for row in metrics]
    assert without_times(rows) == without_times(whole.metrics)
    assert weights_digest(run.dir, STEPS) == weights_digest(whole.dir, STEPS)
    for step in range(1, STEPS + 1):
        made, expected = (without_chance(folder, step) for folder in (run.dir, whole.dir))
        assert made == expected


def without_chance(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """The episodes of a step as they were sampled and scored, without times and ids of traces."""
    found = []
    for record in TraceStore(run_dir).records(step, "train"):
        data = record.trajectory.to_json()
        for name in ("metrics", "spans", "trace_id"):
            del data[name]
        for turn in data["turns"]:
            del turn["latency_s"], turn["request_id"], turn["cached_tokens"]
        found.append({**data, "advantages": None if record.advantages is None else record.advantages.tolist()})
    return found


@pytest.mark.slow
def test_a_run_that_loses_a_rank_goes_on_by_itself(whole: Run, background: Any) -> None:
    run = background(*OPTIONS, "trainer.max_restarts=2", "rollout.replicas=2")
    run.wait_for_steps(3)
    ask(run.dir, "scale", rollout=3)
    (first,) = run.children("trainer.learner.process")
    first.kill()
    while not (others := [rank for rank in run.children("trainer.learner.process") if rank.pid != first.pid]):
        assert run.process.poll() is None, run.finish()
        time.sleep(0.02)
    others[0].kill()  # while it starts
    code, out = run.finish()
    assert code == 0, out
    assert "trainer rank 0 died (exit code -9)" in out
    assert len(re.findall(r"goes on by itself from the checkpoint of step [24] \([12] of 2\)", out)) == 2, out
    settings = json.loads((run.dir / "logs" / "server.settings.json").read_text())
    assert settings["replicas"] == 3  # as it was scaled
    metrics = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert without_times(metrics) == without_times(whole.metrics)
    assert weights_digest(run.dir, STEPS) == weights_digest(whole.dir, STEPS)


@pytest.mark.slow
def test_the_commands_that_look_at_a_run_and_change_it(background: Any, agentloop: Any) -> None:
    run = background("run.steps=1000", "eval.every=null", "rollout.replicas=2")
    run.wait_for_steps(1)
    folder = str(run.dir)
    status = agentloop("cluster", "status", folder)
    assert status.code == 0 and "of 1000, version" in status.out and "replica torch-1  serving" in status.out, status
    scaled = agentloop("cluster", "scale", folder, "rollout=1")
    assert scaled.code == 0 and "rollout: 1 replica;" in scaled.out, scaled.err
    for word, error in (
        ("rollout=0", "has no number of 1 to 1024"), ("trainer=2", "names no part of a run"),
        ("agents=2", "cluster.agents.workers=1"),
    ):  # fmt: skip
        refused = agentloop("cluster", "scale", folder, word)
        assert refused.code == 2 and error in refused.err, refused.err
    run.interrupt()
    assert run.finish()[0] == 130
    over = agentloop("cluster", "status", folder)
    assert over.code == 2 and f"no run is going on in {folder}" in over.err
    assert not (run.dir / "control.sock").exists()
