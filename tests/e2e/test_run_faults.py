"""A run directory in use, finished, or damaged: one error line, or the way on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import FINISHED_STEPS, Run
from trainer.run.rundir import RunDir


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Path:
    """A finished run of one's own, under the name that `quickstart` uses."""
    return Path(shutil.copytree(finished.dir, tmp_path / "outputs" / "run"))


def test_a_finished_run_says_so_at_once(copy: Path, finished: Run, refused: Any) -> None:
    again = refused("--resume", f"run.steps={FINISHED_STEPS}")
    assert again.code == 0, again.err
    assert f"is finished: {FINISHED_STEPS} of {FINISHED_STEPS} steps" in again.out
    assert "load tokenizer" not in again.out and again.metrics == finished.metrics
    other = refused("--resume", f"run.steps={FINISHED_STEPS}", "rollout.replicas=2")
    assert other.code == 0 and "is finished" in other.out and "start trainer" not in other.out


def test_a_run_that_goes_on_from_an_older_checkpoint_keeps_its_first_evaluation(copy: Path, quickstart: Any) -> None:
    newest = RunDir(copy).checkpoint_of(FINISHED_STEPS)
    tensors = newest / "trainer" / "__0_0.distcp"
    data = bytearray(tensors.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4096] = bytes(4096)
    tensors.write_bytes(data)
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "rew')
    again = quickstart("--resume", f"run.steps={FINISHED_STEPS + 1}")
    assert again.code == 0, again.err
    assert f"__0_0.distcp was altered: it has another checksum. It is now {newest.name}.damaged" in again.out
    assert f"goes on from step {FINISHED_STEPS - 1}" in again.out
    assert "is not JSON, perhaps torn by a kill" in again.out
    assert [row["step"] for row in again.train_metrics] == list(range(1, FINISHED_STEPS + 2))
    first, *_, last = [row["eval/reward_mean"] for row in again.metrics if row.get("eval/reward_mean") is not None]
    assert f"(first {first:.3g}" in again.out and "first and last evaluation" in again.out
    assert f"{last:.3g}" in again.out.split("evaluation reward")[1].splitlines()[0]


def test_without_an_intact_checkpoint_the_failing_command_is_not_the_advice(copy: Path, refused: Any) -> None:
    for folder in RunDir(copy).checkpoint_folders():
        (folder / "state.json").write_text("{")
    again = refused("--resume", f"run.steps={FINISHED_STEPS + 1}")
    assert again.code == 2 and "Traceback" not in again.err
    assert "is intact" in again.err and "checkpoints away" in again.err and "continue with" not in again.err


def test_a_second_process_on_the_run_directory_is_refused_and_ctrl_c_ends_the_first_cleanly(
    background: Any, refused: Any
) -> None:
    run = background("run.steps=100000", "eval.before_train=false", "eval.every=null")
    run.wait_for_steps(1)
    for flags in (["--resume"], []):
        second = refused("run.steps=100000", *flags)
        assert second.code == 2 and f"in use by process {run.process.pid} on " in second.err, second.err
    children = run.children("rollout_server", "trainer.learner.process")
    assert len(children) == 2
    run.interrupt()
    code, out = run.finish()
    assert code == 130 and "--resume" in out, out
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    done = [row["step"] for row in Run(code, out, "", run.dir).train_metrics]
    assert done == list(range(1, len(done) + 1))
