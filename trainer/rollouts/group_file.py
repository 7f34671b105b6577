"""Write finished groups into a checkpoint and read them back, images included.

`groups.parquet` has the columns of a trace (`agentloop.trace.store`), one row a trajectory; its
metadata says which rows are whose. Checkpoints of earlier versions have `groups.jsonl` instead,
which is read too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from agentloop.errors import AgentloopError, RunDirError
from agentloop.files import read_json
from agentloop.trace.record import TraceRecord
from agentloop.trace.store.bundle import read_bundle, write_bundle
from agentloop.types import Task, Trajectory
from trainer.algorithms.dynamic_sampling import replacement
from trainer.checkpoint_files import GROUPS_FILE, OLD_GROUPS_FILE
from trainer.rollouts.producer import Group, PicksRows


def encode_groups(groups: Sequence[Group]) -> bytes:
    """Return the bytes of `groups.parquet`; empty if there are no groups."""
    if not groups:
        return b""
    heads = [
        {
            "index": group.index,
            "task_id": group.task.task_id,
            "replaced": group.replaced,
            "given_up": group.given_up,
            "seconds": group.finished_s - group.started_s,
            "episodes": [len(episode) for episode in group.episodes],
            "baseline": len(group.baseline),
        }
        for group in groups
    ]
    records = [
        TraceRecord(0, "train", 0, part, len(episode), trajectory)
        for group in groups
        for episode in (*group.episodes, group.baseline)
        for part, trajectory in enumerate(episode)
    ]
    return write_bundle(records, {"groups": heads})


def read_groups(checkpoint: Path, tasks: Sequence[Task], rows: PicksRows) -> list[Group]:
    """Return the groups of a checkpoint; an empty list if it has no file of them.

    Args:
        tasks: the training rows.
        rows: the row of a group, by the group's index.

    Raises:
        RunDirError: the file is damaged, or the row of a group has changed.
    """
    for name, read in ((GROUPS_FILE, _read_parquet), (OLD_GROUPS_FILE, _read_lines)):
        path = checkpoint / name
        if path.is_file():
            return [_checked(path, group, task_id) for group, task_id in read(path, tasks, rows)]
    return []


def _read_parquet(path: Path, tasks: Sequence[Task], rows: PicksRows) -> Iterator[tuple[Group, str]]:
    """Yield the groups of a file, each with the id of the row it was sampled from."""
    try:
        records, metadata = read_bundle(path)
        trajectories = iter([record.trajectory for record in records])
        for head in metadata["groups"]:
            episodes = [[next(trajectories) for _ in range(count)] for count in head["episodes"]]
            baseline = [next(trajectories) for _ in range(head["baseline"])]
            yield _group(head, episodes, baseline, tasks, rows), head["task_id"]
    except (AgentloopError, ValueError, LookupError, TypeError, RuntimeError) as exc:
        raise RunDirError(
            f"{path} does not hold finished groups: {exc!r}", "delete the file to sample its groups again"
        ) from exc


def _read_lines(path: Path, tasks: Sequence[Task], rows: PicksRows) -> Iterator[tuple[Group, str]]:
    """Yield the groups of a file that an earlier version wrote, one a line."""
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            data = read_json(line)
            episodes = [_trajectories(episode) for episode in data["episodes"]]
            group = _group(data, episodes, _trajectories(data["baseline"]), tasks, rows)
            task_id = data["task_id"]
        except (ValueError, AgentloopError, LookupError, TypeError, AttributeError) as exc:
            raise RunDirError(
                f"{path}, line {number}, is not a finished group: {exc!r}", "delete the file to sample its groups again"
            ) from exc
        yield group, task_id


def _group(
    head: dict[str, Any],
    episodes: list[list[Trajectory]],
    baseline: list[Trajectory],
    tasks: Sequence[Task],
    rows: PicksRows,
) -> Group:
    index, replaced = int(head["index"]), int(head["replaced"])
    group = Group(
        index,
        tasks[rows[replacement(index, replaced)]],
        episodes,
        baseline=baseline,
        replaced=replaced,
        given_up=bool(head["given_up"]),
    )
    group.finished_s = group.started_s + float(head["seconds"])
    return group


def _checked(path: Path, group: Group, task_id: str) -> Group:
    if task_id != group.task.task_id:
        raise RunDirError(
            f"{path}: group {group.index} was sampled from row {task_id}, which is now row {group.task.task_id}",
            "restore data.* and seed, or delete the file to sample its groups again",
        )
    return group


def _trajectories(data: Sequence[dict[str, Any]]) -> list[Trajectory]:
    return [Trajectory.from_json(trajectory) for trajectory in data]
