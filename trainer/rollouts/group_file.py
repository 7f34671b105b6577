"""Write finished groups into a checkpoint and read them back: `groups.jsonl`, one group a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentloop.errors import RunDirError, TokenLawError
from agentloop.files import json_line, read_json
from agentloop.types import Task, Trajectory
from trainer.algorithms.dynamic_sampling import replacement
from trainer.checkpoint_files import GROUPS_FILE
from trainer.rollouts.producer import Group, PicksRows


def encode_groups(groups: Sequence[Group]) -> bytes:
    """Return the lines of `groups`.

    Groups with images are left out: a trajectory's JSON form does not hold them, so a resumed run
    samples those groups again.
    """
    return b"".join(
        _line(group) for group in groups if not any(t.images for t in (*group.trajectories, *group.baseline))
    )


def _line(group: Group) -> bytes:
    body = {
        "index": group.index,
        "task_id": group.task.task_id,
        "replaced": group.replaced,
        "given_up": group.given_up,
        "seconds": group.finished_s - group.started_s,
        "episodes": [[trajectory.to_json() for trajectory in episode] for episode in group.episodes],
        "baseline": [trajectory.to_json() for trajectory in group.baseline],
    }
    return json_line(body)


def read_groups(checkpoint: Path, tasks: Sequence[Task], rows: PicksRows) -> list[Group]:
    """Return the groups of a checkpoint; an empty list if it has no `groups.jsonl`.

    Args:
        tasks: the training rows.
        rows: the row of a group, by the group's index.

    Raises:
        RunDirError: the file is damaged, or the row of a group has changed.
    """
    path = checkpoint / GROUPS_FILE
    if not path.is_file():
        return []

    groups = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            data = read_json(line)
            index, replaced = int(data["index"]), int(data["replaced"])
            group = Group(
                index,
                tasks[rows[replacement(index, replaced)]],
                [_trajectories(episode) for episode in data["episodes"]],
                baseline=_trajectories(data["baseline"]),
                replaced=replaced,
                given_up=bool(data["given_up"]),
            )
            group.finished_s = group.started_s + float(data["seconds"])
            same = data["task_id"] == group.task.task_id
        except (ValueError, TokenLawError, LookupError, TypeError, AttributeError) as exc:
            raise RunDirError(
                f"{path}, line {number}, is not a finished group: {exc!r}", "delete the file to sample its groups again"
            ) from exc

        if not same:
            raise RunDirError(
                f"{path}: group {group.index} was sampled from row {data['task_id']}, which is now row "
                f"{group.task.task_id}",
                "restore data.* and seed, or delete the file to sample its groups again",
            )
        groups.append(group)
    return groups


def _trajectories(data: Sequence[dict[str, Any]]) -> list[Trajectory]:
    return [Trajectory.from_json(trajectory) for trajectory in data]
