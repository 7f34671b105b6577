"""The run directory: claimed once, written whole, rewound for a resumed run."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from agentloop.errors import RunDirError
from agentloop.types import StopReason, Trajectory, Turn
from trainer.rundir import RunDir


def make(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    run_dir.open({"seed": 0, "run": {"steps": 3}}, {"python": "3"}, resume=False)
    return run_dir


def test_a_directory_that_holds_a_run_is_refused_with_the_two_ways_out(tmp_path: Path) -> None:
    make(tmp_path).append_metrics({"step": 1})
    with pytest.raises(RunDirError) as caught:
        RunDir(tmp_path / "run").open({}, {}, resume=False)
    assert "--resume" in str(caught.value) and "run.name" in str(caught.value)


def test_a_start_that_failed_before_its_first_number_may_be_repeated(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path)


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="holds no run"):
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
        run_dir.write_trace(step, "train", [])
    run_dir.rewind(2)
    assert [row["step"] for row in run_dir.read_metrics()] == [1, 2]
    assert sorted(p.name for p in run_dir.traces.iterdir()) == ["step_1", "step_2"]


def test_an_unfinished_checkpoint_does_not_count(tmp_path: Path) -> None:
    run_dir = make(tmp_path)
    (run_dir.checkpoint_of(1)).mkdir()
    (run_dir.checkpoint_of(1) / "state.json").write_text('{"step": 1, "version": 1}')
    (run_dir.checkpoint_of(2)).mkdir()
    assert [state.step for state in run_dir.list_checkpoints()] == [1]


def test_pruning_keeps_the_newest_checkpoints_and_the_weights_in_use(tmp_path: Path) -> None:
    run_dir = make(tmp_path)
    for step in (1, 2, 3):
        run_dir.checkpoint_of(step).mkdir()
        (run_dir.checkpoint_of(step) / "state.json").write_text(f'{{"step": {step}, "version": {step}}}')
        run_dir.weights_of(step).mkdir()
    run_dir.prune(keep_checkpoints=2, current_version=3)
    assert [state.step for state in run_dir.list_checkpoints()] == [2, 3]
    assert sorted(p.name for p in run_dir.weights.iterdir()) == ["v_2", "v_3"]


def test_a_trace_reads_back_as_the_same_trajectory(tmp_path: Path) -> None:
    run_dir = make(tmp_path)
    trajectory = Trajectory(
        token_ids=[1, 2, 3], loss_mask=[0, 1, 1], logprobs=[None, -0.5, -0.25], versions=[None, 4, 4], prompt_length=1,
        turns=[Turn(1, 3, "hi", StopReason.LENGTH)], reward=0.5, stop_reason=StopReason.LENGTH,
    )  # fmt: skip
    run_dir.write_trace(7, "train", [trajectory])
    lines = (run_dir.traces / "step_7" / "train.jsonl").read_bytes().splitlines()
    assert [Trajectory.from_json(orjson.loads(line)) for line in lines] == [trajectory]
