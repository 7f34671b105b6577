"""A run that was killed and resumed is, to the bit, the run that was never stopped."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

STEPS = 5
OPTIONS = (f"run.steps={STEPS}", "checkpoint.every=2", "eval.every=2", "rollout.max_running=12")


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics but those of time."""
    ends = ("time_s", "tokens_per_s", "wait_s")
    return [{k: v for k, v in row.items() if not k.endswith(ends) and "lag" not in k} for row in rows]


def weights_digest(run_dir: Path, version: int) -> str:
    return hashlib.sha256((run_dir / "weights" / f"v_{version}" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_killed_at_random_points_and_resumed_it_is_the_same_run_to_the_bit(quickstart: Any, background: Any) -> None:
    seed = int(os.environ.get("RESUME_SEED", time.time_ns() % 2**32))
    print(f"RESUME_SEED={seed}")
    rng = random.Random(seed)
    whole = quickstart(*OPTIONS, name="whole")
    assert whole.code == 0, whole.err

    for number, step in enumerate(sorted(rng.sample(range(STEPS), 3))):
        run = background(*OPTIONS, *(["--resume"] if number else []))
        run.wait_for_steps(step)
        time.sleep(rng.random() * 0.6)
        run.kill()
    rest = quickstart(*OPTIONS, "--resume", "rollout.replicas=2")  # who samples makes no difference either
    assert rest.code == 0, rest.err
    assert "changed since the run was started: rollout.replicas: 1 -> 2" in rest.out
    assert without_times(rest.metrics) == without_times(whole.metrics)
    assert [row["step"] for row in rest.metrics] == list(range(STEPS + 1))
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


SLOW_REWARD = """
import importlib.util
import pathlib
import time

spec = importlib.util.spec_from_file_location("own", {own!r})
own = importlib.util.module_from_spec(spec)
spec.loader.exec_module(own)
calls = 0


def score(row, text, trajectory):
    global calls
    calls += 1
    hold = pathlib.Path("hold")
    if hold.exists() and calls > {calls}:
        pathlib.Path("reached").touch()
        time.sleep(3600)
    return own.score(row, text, trajectory)
"""


def test_ctrl_c_during_an_evaluation_loses_neither_the_step_nor_the_evaluation(
    quickstart: Any, background: Any, repo: Path, tmp_path: Path
) -> None:
    options = ("run.steps=3", "eval.every=2", "eval.before_train=false")
    whole = quickstart(*options, name="whole")
    assert whole.code == 0, whole.err

    # Two steps of 16 episodes, and the fourth of the evaluation never ends.
    own = str(repo / "recipes" / "quickstart" / "reward.py")
    (tmp_path / "slow.py").write_text(SLOW_REWARD.format(own=own, calls=2 * 16 + 3))
    (tmp_path / "hold").touch()
    slow = f"reward={tmp_path}/slow.py:score"
    run = background(*options, slow, "rollout.max_staleness=0")
    deadline = time.monotonic() + 120
    while not (tmp_path / "reached").exists():
        assert run.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(120) == 130
    (tmp_path / "hold").unlink()

    rest = quickstart(*options, slow, "--resume")
    assert rest.code == 0, rest.err
    assert without_times(rest.metrics) == without_times(whole.metrics)
    assert [row["step"] for row in rest.metrics if "eval/reward_mean" in row] == [2, 3]
    for step in (1, 2, 3):
        ours, theirs = rest.trace(step), whole.trace(step)
        assert [(line["token_ids"], line["reward"]) for line in ours] == [
            (line["token_ids"], line["reward"]) for line in theirs
        ]
