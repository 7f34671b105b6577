"""The run directory: claimed once, written whole, rewound for a resumed run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agentloop.config import CheckpointConfig
from agentloop.errors import RunDirError
from agentloop.trace.store import TraceStore
from trainer.checkpoint_files import seal
from trainer.run.rundir import RunDir


def make(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    run_dir.open({"seed": 0, "run": {"steps": 3}}, {"python": "3"}, resume=False)
    return run_dir


def save(run_dir: RunDir, step: int) -> None:
    run_dir.checkpoint_of(step).mkdir()
    seal(run_dir.checkpoint_of(step), {"step": step, "version": step})


def test_a_directory_that_holds_a_run_is_refused_with_the_two_ways_out(tmp_path: Path) -> None:
    make(tmp_path).append_metrics({"step": 1})
    with pytest.raises(RunDirError) as caught:
        RunDir(tmp_path / "run").open({}, {}, resume=False)
    assert "--resume" in str(caught.value) and "run.name" in str(caught.value)


def test_a_start_that_failed_before_its_first_number_may_be_repeated(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path)


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="does not hold a run"):
        RunDir(tmp_path / "nothing").open({}, {}, resume=True)


def test_resume_lists_changed_keys(tmp_path: Path) -> None:
    make(tmp_path)
    changes = RunDir(tmp_path / "run").open({"seed": 0, "run": {"steps": 5}, "new": 1}, {}, resume=True)
    assert changes == ["new: (absent) -> 1", "run.steps: 3 -> 5"]


def test_a_torn_last_line_of_the_metrics_is_skipped(tmp_path: Path) -> None:
    run_dir = make(tmp_path)
    run_dir.append_metrics({"step": 1})
    with run_dir.metrics_file.open("ab") as file:
        file.write(b'{"step": 2, "rew')
    assert run_dir.read_metrics() == [{"step": 1}]


def test_rewind_forgets_what_came_after(tmp_path: Path) -> None:
    run_dir = make(tmp_path)
    for step in (1, 2, 3):
        run_dir.append_metrics({"step": step})
        TraceStore(run_dir.root).write(step, "train", [])
    run_dir.rewind(2)
    assert [row["step"] for row in run_dir.read_metrics()] == [1, 2]
    assert sorted(p.name for p in run_dir.traces.iterdir()) == ["step_1", "step_2"]


def test_an_unfinished_checkpoint_does_not_count(tmp_path: Path) -> None:
    run_dir = make(tmp_path)
    save(run_dir, 1)
    (run_dir.checkpoint_of(2)).mkdir()
    assert [state.step for state in run_dir.list_checkpoints()] == [1]


def test_pruning_keeps_the_best_checkpoints_beside_the_newest(tmp_path: Path) -> None:
    run_dir = make(tmp_path)
    scores: list[float | None] = [0.1, 0.9, None, 0.9, 0.5, 0.2, None]
    for step, score in enumerate(scores, 1):
        run_dir.append_metrics({"step": step} | ({} if score is None else {"eval/reward_mean": score, "loss": -score}))
        save(run_dir, step)
        run_dir.prune_checkpoints(CheckpointConfig(keep=1, keep_best=2))
    assert [state.step for state in run_dir.list_checkpoints()] == [2, 4, 7]
    config = CheckpointConfig(keep=1, keep_best=1, best_metric="loss", best_is="lowest")
    assert [state.step for state in run_dir.best_checkpoints(config)] == [4]
    run_dir.prune_checkpoints(config)
    assert [state.step for state in run_dir.list_checkpoints()] == [4, 7]


def test_a_model_is_not_changed_on_the_way(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.open({"model": {"path": "/a"}}, {}, resume=False)
    run_dir.open({"model": {"path": "/b"}}, {}, resume=True)  # nothing is saved yet: it starts from the beginning
    save(run_dir, 1)
    with pytest.raises(RunDirError, match=r"model.path was /b and is now /c(?s:.*)model.path=/b"):
        run_dir.open({"model": {"path": "/c"}}, {}, resume=True)


def test_a_batch_keeps_its_size_while_finished_groups_wait_in_a_checkpoint(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.open({"rollout": {"batch_size": 4}}, {}, resume=False)
    save(run_dir, 1)
    assert run_dir.open({"rollout": {"batch_size": 8}}, {}, resume=True) == ["rollout.batch_size: 4 -> 8"]
    groups = run_dir.list_checkpoints()[-1].groups_file
    groups.write_bytes(b"{}\n")
    with pytest.raises(RunDirError, match=r"rollout.batch_size was 8 and is now 4(?s:.*)delete .*groups.parquet"):
        run_dir.open({"rollout": {"batch_size": 4}}, {}, resume=True)
    groups.unlink()
    run_dir.open({"rollout": {"batch_size": 4}}, {}, resume=True)


def test_what_a_killed_save_left_is_removed_and_what_it_was_to_replace_stays(tmp_path: Path) -> None:
    run_dir = make(tmp_path)
    save(run_dir, 1)
    run_dir.checkpoint_of(1).rename(run_dir.checkpoints / ".step_1.stale")
    (run_dir.checkpoints / ".step_2.partial" / "trainer").mkdir(parents=True)
    (run_dir.checkpoints / ".step_2.groups.0").write_bytes(b"")
    run_dir.open({"seed": 0, "run": {"steps": 3}}, {}, resume=True)
    assert [path.name for path in run_dir.checkpoints.iterdir()] == ["step_1"]


def test_pruning_keeps_the_newest_checkpoints(tmp_path: Path) -> None:
    run_dir = make(tmp_path)
    for step in (1, 2, 3):
        save(run_dir, step)
    run_dir.prune_checkpoints(CheckpointConfig(keep=2))
    assert [state.step for state in run_dir.list_checkpoints()] == [2, 3]


def test_a_directory_in_use_is_refused_with_the_process_that_uses_it(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    with run_dir.claimed():
        run_dir.open({"seed": 0}, {}, resume=False)
        for resume in (False, True):
            with (
                pytest.raises(RunDirError, match=rf"in use by process {os.getpid()} on (?s:.*)kill {os.getpid()}"),
                RunDir(tmp_path / "run").claimed(resume=resume),
            ):
                pytest.fail("the second process came in")
    with RunDir(tmp_path / "run").claimed(resume=True):
        pass


def test_a_claim_that_writes_nothing_leaves_nothing(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run").claimed():
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunDirError, match="does not hold a run"), RunDir(tmp_path / "run").claimed(resume=True):
        pytest.fail("it holds no run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match=r"cannot be used: (?s:.*)set run\.dir"), RunDir(tmp_path / name).claimed():
        pytest.fail("it cannot be used")


def test_odd_lines_of_the_metrics_are_told_and_the_rest_is_kept(tmp_path: Path) -> None:
    run_dir = make(tmp_path)
    odd = [b'{"step": 2, "rew', b"[1]", b'{"loss": 1}', b'{"step": "3"}', b"\xff", b"null", b'{"step": true}']
    odd.append(b'{"step": 1, "reward/mean": "abc"}')
    run_dir.metrics_file.write_bytes(b"\n".join([b'{"step": 1}', *odd, b'{"step": 4}', b""]))
    told: list[str] = []
    run_dir.rewind(4, told.append)
    assert len(told) == 1 and "line 2 is not JSON" in told[0] and "line 4 has no step and 5 more" in told[0]
    assert run_dir.metrics_file.read_bytes() == b'{"step":1}\n{"step":4}\n'
    run_dir.prune_checkpoints(CheckpointConfig(keep_best=1))


def test_a_finished_run_is_known_until_it_is_opened_again(tmp_path: Path) -> None:
    run_dir = make(tmp_path)
    assert run_dir.finished_steps() is None
    run_dir.mark_finished(3)
    assert run_dir.finished_steps() == 3
    run_dir.open({"seed": 1}, {}, resume=True)
    assert run_dir.finished_steps() is None
