"""Read the JSON lines that earlier versions wrote: `traces/step_N/{train,eval}.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from agentloop.errors import TokenLawError
from agentloop.trace.record import TraceRecord
from agentloop.trace.store.files import TraceFile
from agentloop.trace.store.images import ImageFolder
from agentloop.types import Trajectory


def read_old_records(file: TraceFile, images: ImageFolder) -> list[TraceRecord]:
    """Return the trajectories of an old trace; lines that hold none are left out."""
    found = [trajectory for line in read_lines(file.path) if (trajectory := _trajectory(line)) is not None]
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


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, a line each; other lines, such as a torn one, are left
    out."""
    with path.open("rb") as file:
        for line in file:
            data = _parse(line)
            if isinstance(data, dict):
                yield data


def _parse(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    try:  # the standard library also accepts NaN and lone surrogates, which other writers produce
        return json.loads(data.decode("utf-8", "replace"))
    except (json.JSONDecodeError, RecursionError):
        return None


def _trajectory(line: dict[str, Any]) -> Trajectory | None:
    known = {key: value for key, value in line.items() if key != "pieces"}
    try:
        return Trajectory.from_json(known)
    except (TokenLawError, AttributeError):
        return None


def _episode(trajectory: Trajectory) -> tuple[str, int, str]:
    return trajectory.group_id, trajectory.sample_index, trajectory.task_id


def _version(file: TraceFile) -> int:
    """Return the version of a step: training of step N starts from N - 1, evaluation sees N."""
    return file.step if file.split == "eval" else max(0, file.step - 1)
