"""Finished groups in a checkpoint: they read back as written, and only for the same rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentloop.errors import RunDirError
from agentloop.types import StepReward, StopReason, Task, Trajectory, Turn
from trainer.algorithms.dynamic_sampling import replacement
from trainer.rollouts.group_file import GROUPS_FILE, encode_groups, read_groups
from trainer.rollouts.producer import Group

TASKS = [Task(task_id=f"row {i}", agent_name="a", prompt=[]) for i in range(4)]
ROWS = [2, 0, 3, 1]


def group(index: int, **fields: Any) -> Group:
    trajectory = Trajectory(
        [5, 6, 7], [0, 1, 1], [None, -0.1234567890123, -2.5e-8], [None, 3, 4], 1,
        turns=[Turn(1, 3, "text", StopReason.STOP, request_id="r", order=1)], reward=0.1 + 0.2, outcome=None,
        step_rewards=[StepReward("tool", 0.5, 1, 3)], stop_reason=StopReason.MAX_TURNS, metrics={"tool_calls": 2.0},
        **fields,
    )  # fmt: skip
    return Group(
        index, TASKS[ROWS[index]], [[trajectory], [trajectory, trajectory]], baseline=[trajectory], started_s=1.0,
        finished_s=3.5,
    )  # fmt: skip


def test_groups_come_back_as_they_were(tmp_path: Path) -> None:
    replaced = replace(group(1), task=TASKS[3], replaced=2, given_up=True)
    rows = {1: ROWS[1], replacement(1, 2): 3, 3: ROWS[3]}
    groups = [replaced, group(3)]
    (tmp_path / GROUPS_FILE).write_bytes(encode_groups(groups))
    back = read_groups(tmp_path, TASKS, rows)
    assert [replace(g, started_s=0, finished_s=0) for g in back] == [
        replace(g, started_s=0, finished_s=0) for g in groups
    ]
    assert [g.finished_s - g.started_s for g in back] == pytest.approx([2.5, 2.5])


def test_a_checkpoint_without_groups_has_none(tmp_path: Path) -> None:
    assert read_groups(tmp_path, TASKS, ROWS) == []


def test_groups_with_images_are_left_out_because_they_would_come_back_without(tmp_path: Path) -> None:
    assert encode_groups([group(1, images=["picture"])]) == b""
    greedy = replace(group(1), baseline=group(1, images=["picture"]).baseline)
    assert encode_groups([greedy]) == b""


def test_groups_of_other_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / GROUPS_FILE).write_bytes(encode_groups([group(1)]))
    with pytest.raises(RunDirError, match="row row 0, which is now row row 1"):
        read_groups(tmp_path, TASKS, [0, 1, 2, 3])


def test_a_damaged_file_is_refused_by_line(tmp_path: Path) -> None:
    (tmp_path / GROUPS_FILE).write_bytes(encode_groups([group(1)]) + b'{"index": 2, "epis')
    with pytest.raises(RunDirError, match=r"line 2.*(?s:.*)delete the file"):
        read_groups(tmp_path, TASKS, ROWS)
