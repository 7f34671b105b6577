"""Checkpoints are written while training goes on, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import pytest_asyncio

from agentloop.config import CheckpointConfig, TrainerConfig
from agentloop.errors import DiskError, RunDirError, WorkerError
from agentloop.types import StopReason, Task, Trajectory
from tests.trainer.conftest import make_samples, start_workers
from trainer.checkpoint_files import GROUPS_FILE, verify
from trainer.learner.learner import Learner
from trainer.rollouts.group_file import read_groups
from trainer.rollouts.producer import Group
from trainer.run.checkpoints import Checkpoints
from trainer.run.rundir import RunDir
from trainer.types import LearnerSettings
from trainer.workers.group import WorkerGroup


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[WorkerGroup]:
    """Two ranks, shared by the tests of this file."""
    group = await start_workers(
        model_path=str(tiny_model), config=TrainerConfig.model_validate({"ranks": 2, "optim": {"lr": 1e-2}}),
        dtype="float32", total_steps=100, seed=0, log_dir=tmp_path_factory.mktemp("logs"),
    )  # fmt: skip
    yield group
    await group.close()


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    run_dir.open({}, {}, resume=False)
    return run_dir


async def train_step(workers: WorkerGroup) -> None:
    sums = await workers.accumulate(make_samples(), temperature=1.0)
    await workers.step(sums["normalizer"])


async def weights(workers: WorkerGroup) -> np.ndarray:
    return np.concatenate(await workers.logprobs(make_samples(seed=9), temperature=1.0))


@pytest.mark.asyncio(loop_scope="module")
async def test_a_checkpoint_is_of_the_moment_it_was_asked_for(workers: WorkerGroup, run_dir: RunDir) -> None:
    warnings: list[str] = []
    checkpoints = Checkpoints(workers, run_dir, CheckpointConfig(keep=1), warnings.append)
    await train_step(workers)
    before = await weights(workers)
    await checkpoints.save({"step": 1, "version": 1}, [])
    for _ in range(3):
        await train_step(workers)
    after = await weights(workers)
    await checkpoints.settle()
    assert not np.array_equal(before, after)
    (state,) = run_dir.list_checkpoints()
    await workers.load(state.path / "trainer")
    assert np.array_equal(await weights(workers), before)
    for _ in range(3):
        await train_step(workers)
    assert np.array_equal(await weights(workers), after), "the optimizer goes on where it was too"
    await checkpoints.save({"step": 4, "version": 4}, [], wait=True)
    assert [state.step for state in run_dir.list_checkpoints()] == [4]
    assert not warnings


@pytest.mark.asyncio(loop_scope="module")
async def test_finished_groups_lie_in_the_checkpoint(workers: WorkerGroup, run_dir: RunDir) -> None:
    task = Task(task_id="t", agent_name="a", prompt=[])
    group = Group(5, task, [[Trajectory([1, 2], [0, 1], [None, -0.3], [None, 1], 1, stop_reason=StopReason.STOP)]])
    checkpoints = Checkpoints(workers, run_dir, CheckpointConfig(), pytest.fail)
    await checkpoints.save({"step": 1, "version": 1}, [group], wait=True)
    (state,) = run_dir.list_checkpoints()
    (back,) = read_groups(state.path, [task], [0] * 6)
    assert (back.index, back.episodes) == (5, group.episodes)
    assert sorted(path.name for path in run_dir.checkpoints.iterdir()) == ["step_1"]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_save_that_fails_is_told_and_older_ones_stay(workers: WorkerGroup, run_dir: RunDir) -> None:
    warnings: list[str] = []
    checkpoints = Checkpoints(workers, run_dir, CheckpointConfig(keep=1, asynchronous=False), warnings.append)
    await checkpoints.save({"step": 1, "version": 1}, [])
    obstacle = run_dir.checkpoints / ".step_2.partial"
    obstacle.symlink_to("/dev/null/nowhere")  # a folder cannot be made here
    await checkpoints.save({"step": 2, "version": 2}, [])
    assert len(warnings) == 1 and "step 2 could not be written" in warnings[0]
    assert [state.step for state in run_dir.list_checkpoints()] == [1]
    with pytest.raises(WorkerError, match="could not be written"):
        await checkpoints.save({"step": 2, "version": 2}, [], wait=True)
    obstacle.unlink()
    await checkpoints.save({"step": 2, "version": 2}, [], wait=True)
    assert [state.step for state in run_dir.list_checkpoints()] == [2]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_full_disk_is_one_line_without_a_traceback(
    workers: WorkerGroup, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    checkpoints = Checkpoints(workers, run_dir, CheckpointConfig(keep=1, asynchronous=False), warnings.append)
    ranks = [psutil.Process(rank.process.pid) for rank in workers._ranks]
    limits = [rank.rlimit(psutil.RLIMIT_FSIZE) for rank in ranks]
    try:
        for rank in ranks:
            rank.rlimit(psutil.RLIMIT_FSIZE, (1000, limits[0][1]))
        await checkpoints.save({"step": 1, "version": 1}, [])
        with pytest.raises(WorkerError, match=r"could not be written \(.* MB free on its disk\)"):
            await checkpoints.save({"step": 1, "version": 1}, [], wait=True)
    finally:
        for rank, limit in zip(ranks, limits, strict=True):
            rank.rlimit(psutil.RLIMIT_FSIZE, limit)
    (warning,) = warnings
    assert "could not be written" in warning and "MB free" in warning and "\n" not in warning
    assert list(run_dir.checkpoints.iterdir()) == []

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    task = Task(task_id="t", agent_name="a", prompt=[])
    group = Group(5, task, [[Trajectory([1, 2], [0, 1], [None, -0.3], [None, 1], 1, stop_reason=StopReason.STOP)]])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        await checkpoints.save({"step": 2, "version": 2}, [group])
        with pytest.raises(DiskError, match="No space left on device"):
            await checkpoints.save({"step": 2, "version": 2}, [group], wait=True)
    assert len(warnings) == 2 and "step 2 could not be written" in warnings[1]
    await checkpoints.save({"step": 2, "version": 2}, [group], wait=True)
    assert [state.step for state in run_dir.list_checkpoints()] == [2]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
@pytest.mark.parametrize("damage", [lambda whole: whole[:200], lambda whole: b"\0" * len(whole), lambda whole: b""])
def test_a_file_that_torch_cannot_read_is_an_error_with_the_folder(
    tiny_model: Path, process_group: None, tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    """As in a checkpoint without checksums. torch's own error is not an `Exception`."""
    learner = Learner(LearnerSettings(str(tiny_model), TrainerConfig(), "float32", 10, 0))
    learner.save(tmp_path / "step_1", {"step": 1, "version": 1})
    file = tmp_path / "step_1" / "trainer" / name
    file.write_bytes(damage(file.read_bytes()))
    for optimizer in (True, False):
        with pytest.raises(RunDirError, match=r"step_1/trainer cannot be read(?s:.*)move .*step_1 away"):
            learner.load(file.parent, optimizer=optimizer)


SAVER = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from agentloop.config import TrainerConfig
from trainer.learner.learner import Learner, LearnerSettings
folder, model = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
learner = Learner(LearnerSettings(model, TrainerConfig(), "float32", 10, 0))
step = 0
while True:
    step += 1
    learner.save(folder / f"step_{step}", {"step": step, "version": step}, wait=False)
    print(step, flush=True)
    learner.saved(wait=True)
"""


def test_a_kill_during_a_save_leaves_whole_checkpoints_only(tiny_model: Path, run_dir: RunDir) -> None:
    saver = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(run_dir.checkpoints), str(tiny_model)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert saver.stdout is not None
    while saver.stdout.readline().strip() != "6":
        assert saver.poll() is None
    saver.send_signal(signal.SIGKILL)
    saver.communicate()
    (run_dir.checkpoints / "store").unlink()
    run_dir.open({}, {}, resume=True)
    states = run_dir.list_checkpoints()
    assert [state.step for state in states] in ([*range(1, 6)], [*range(1, 7)])
    assert sorted(path.name for path in run_dir.checkpoints.iterdir()) == sorted(state.path.name for state in states)
    for state in states:
        written = json.loads((state.path / "state.json").read_text())
        assert (written["step"], written["version"]) == (state.step, state.version)
        assert "trainer/.metadata" in written["files"] and not verify(state.path)
    assert not (states[-1].path / GROUPS_FILE).exists()
