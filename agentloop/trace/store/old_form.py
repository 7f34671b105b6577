"""Read the JSON lines that earlier versions wrote: `traces/step_N/{train,eval}.jsonl`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentloop.errors import TokenLawError, TraceError
from agentloop.files import read_json_lines
from agentloop.trace.record import SPLITS, TraceRecord
from agentloop.trace.store.encode import encode
from agentloop.trace.store.files import OLD, TraceFile, step_folders
from agentloop.trace.store.images import Digests, ImageFolder
from agentloop.types import Trajectory

if TYPE_CHECKING:
    from agentloop.trace.store.store import TraceStore


def read_old_records(file: TraceFile, images: ImageFolder) -> list[TraceRecord]:
    """Return the trajectories of an old trace; lines that hold none are left out."""
    found = [trajectory for line in read_json_lines(file.path) if (trajectory := _read(line, images)) is not None]
    records: list[TraceRecord] = []
    begin = 0
    for i, trajectory in enumerate(found):
        following = found[i + 1] if i + 1 < len(found) else None
        if following is not None and _episode(following) == _episode(trajectory):
            continue
        parts = found[begin : i + 1]
        records += [
            TraceRecord(file.step, file.split, _version(file), part, len(parts), member)
            for part, member in enumerate(parts)
        ]
        begin = i + 1
    return records


@dataclass(frozen=True, slots=True)
class Converted:
    """A file of the old form that is parquet now.

    Attributes:
        lost: lines that hold no trajectory, such as a torn one.
        size: of the parquet file, bytes; 0: there is none, because no line holds a trajectory.
        skipped: whether it was converted before.
    """

    trajectories: int
    lost: int
    size: int
    skipped: bool = False


def old_files(traces: Path) -> list[TraceFile]:
    """Return the files of the old form, also those that are converted already."""
    return [
        TraceFile(step, split, path)
        for step, folder in step_folders(traces).items()
        for split in SPLITS
        if (path := folder / f"{split}{OLD}").is_file()
    ]


def count_lines(file: TraceFile) -> int:
    """Return the number of lines of an old trace that are not blank."""
    with file.path.open("rb") as lines:
        return sum(bool(line.strip()) for line in lines)


def convert(store: TraceStore, file: TraceFile) -> Converted:
    """Write the parquet file of an old one, unless there is an intact one, or no line can be read.

    Raises:
        DiskError: the disk is full or broken.
    """
    count = count_lines(file)
    path = store.path(file.step, file.split)
    with suppress(TraceError), TraceFile(file.step, file.split, path).open() as parquet:
        rows = parquet.metadata.num_rows
        return Converted(rows, max(0, count - rows), path.stat().st_size, skipped=True)
    records = read_old_records(file, store.images)
    if count and not records:
        return Converted(0, count, 0)
    written = store.write(file.step, file.split, records)
    return Converted(written.trajectories, count - written.trajectories, written.size)


def _read(line: dict[str, Any], images: ImageFolder) -> Trajectory | None:
    """Return the trajectory of a line, its images as `ImageFolder.trusted`; None: it is damaged."""
    try:
        trajectory = _trajectory(line)
        if trajectory is not None:
            trajectory.messages = images.located(trajectory.messages)
            trajectory.images = [images.trusted(image) for image in trajectory.images]
            encode([TraceRecord(0, "train", 0, 0, 1, trajectory)], Digests(lambda digest, data: None))
    except Exception:  # noqa: BLE001  # a line may hold anything
        return None
    return trajectory


def _trajectory(line: dict[str, Any]) -> Trajectory | None:
    known = {key: value for key, value in line.items() if key != "pieces"}
    with suppress(TokenLawError, AttributeError):
        return Trajectory.from_json(known)
    # Columns that no class holds, of a rejected trajectory: they are kept as they are.
    columns: dict[str, Any] = {name: known.get(name) for name in _COLUMNS}
    if not isinstance(columns["token_ids"], list):
        return None
    try:
        trajectory = Trajectory.from_json({**known, **{name: [] for name in _COLUMNS}})
    except (TokenLawError, AttributeError):
        return None
    for name, values in columns.items():
        setattr(trajectory, name, values if isinstance(values, list) else [])
    return trajectory


_COLUMNS = ("token_ids", "loss_mask", "logprobs", "versions")


def _episode(trajectory: Trajectory) -> tuple[str, int, str]:
    return trajectory.group_id, trajectory.sample_index, trajectory.task_id


def _version(file: TraceFile) -> int:
    """Return the version of a step: training of step N starts from N - 1, evaluation sees N."""
    return file.step if file.split == "eval" else max(0, file.step - 1)
