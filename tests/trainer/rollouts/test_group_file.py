"""Finished groups in a checkpoint: they read back as written, and only for the same rows."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentloop.errors import RunDirError
from agentloop.images import image_data
from agentloop.types import StepReward, StopReason, Task, Trajectory, Turn
from tests.trainer.conftest import samples_of
from trainer.algorithms.dynamic_sampling import replacement
from trainer.checkpoint_files import GROUPS_FILE, OLD_GROUPS_FILE
from trainer.rollouts.group_file import encode_groups, read_groups
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


def test_images_come_back_as_the_bytes_that_the_server_saw(tmp_path: Path) -> None:
    from PIL import Image

    shown = [Image.new("RGB", (5, 4), (1, 2, 3)), Image.new("L", (3, 3), 9)]
    data = [base64.b64decode(image_data(image)) for image in shown]
    messages = [{"role": "user", "content": [{"type": "image", "image": shown[0]}, {"type": "text", "text": "?"}]}]
    made = [group(1, images=shown, messages=messages), group(3, images=[data[1]])]
    (tmp_path / GROUPS_FILE).write_bytes(encode_groups(made))
    first, second = read_groups(tmp_path, TASKS, ROWS)
    for trajectory in (*first.trajectories, *first.baseline):
        assert trajectory.images == data
        assert trajectory.messages[0]["content"][0] == {"type": "image", "image": data[0]}
    assert first.trajectories[0].images[0] is first.trajectories[1].images[0], "shared, as before"
    assert second.trajectories[0].images == [data[1]]


def test_a_group_with_images_trains_the_same_after_a_resume(tmp_path: Path) -> None:
    from PIL import Image

    shown = Image.new("RGB", (5, 4), (1, 2, 3))
    data = base64.b64decode(image_data(shown))
    made = [group(1, images=[shown]), group(3, images=[{"bytes": data}])]
    (tmp_path / GROUPS_FILE).write_bytes(encode_groups(made))
    for before, after in zip(made, read_groups(tmp_path, TASKS, ROWS), strict=True):
        pairs = zip(samples_of(before, "grpo"), samples_of(after, "grpo"), strict=True)
        for sample, again in pairs:
            assert [image.tobytes() for image in again.images] == [data]
            assert again.group_key == sample.group_key, "they share their prompt and its images as before"
            assert again.token_ids.tolist() == sample.token_ids.tolist()
            assert again.old_logprobs.tolist() == sample.old_logprobs.tolist()
            assert again.advantages.tolist() == sample.advantages.tolist()


def test_groups_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    made = group(1)
    line = {
        "index": 1, "task_id": made.task.task_id, "replaced": 0, "given_up": False, "seconds": 2.5,
        "episodes": [[t.to_json() for t in episode] for episode in made.episodes],
        "baseline": [t.to_json() for t in made.baseline],
    }  # fmt: skip
    (tmp_path / OLD_GROUPS_FILE).write_text(json.dumps(line) + "\n")
    (back,) = read_groups(tmp_path, TASKS, ROWS)
    assert (back.episodes, back.baseline) == (made.episodes, made.baseline)
    (tmp_path / OLD_GROUPS_FILE).write_text(json.dumps(line) + '\n{"index": 2, "epis')
    with pytest.raises(RunDirError, match=r"line 2.*(?s:.*)delete the file"):
        read_groups(tmp_path, TASKS, ROWS)


def test_groups_of_other_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / GROUPS_FILE).write_bytes(encode_groups([group(1)]))
    with pytest.raises(RunDirError, match="row row 0, which is now row row 1"):
        read_groups(tmp_path, TASKS, [0, 1, 2, 3])


@pytest.mark.parametrize("damage", [lambda data: data[:-50], lambda data: data[:4] + data[5:], lambda data: b""])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    (tmp_path / GROUPS_FILE).write_bytes(damage(encode_groups([group(1)])))
    with pytest.raises(RunDirError, match=r"groups.parquet does not hold(?s:.*)delete the file"):
        read_groups(tmp_path, TASKS, ROWS)
