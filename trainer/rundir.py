"""The run directory: its layout, who may use it, and writing so that a reader never sees half a file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from agentloop.errors import RunDirError
from agentloop.types import Trajectory


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: temporary name, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint says beside the tensors."""

    step: int
    version: int
    path: Path
    kl_coef: float | None = None


class RunDir:
    """Paths of a run and the few operations on them.

    outputs/<run>/config/resolved.json  env.json  metrics.jsonl  logs/*.log  traces/step_N/{train,eval}.jsonl
                  checkpoints/step_N/   weights/v_N/   report.html
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.config_file = self.root / "config" / "resolved.json"
        self.env_file = self.root / "env.json"
        self.metrics_file = self.root / "metrics.jsonl"
        self.logs = self.root / "logs"
        self.traces = self.root / "traces"
        self.checkpoints = self.root / "checkpoints"
        self.weights = self.root / "weights"

    @property
    def holds_run(self) -> bool:
        """Whether there is something to lose: a start that failed before its first number may be repeated."""
        return self.metrics_file.exists() or bool(self.list_checkpoints())

    def check_free(self) -> None:
        """Refuse to start a new run over an old one.

        Raises:
            RunDirError: with the two ways out.
        """
        if self.holds_run:
            raise RunDirError(
                f"{self.root} holds a run already",
                "continue it with --resume, or give this run another name: run.name=<name> (or run.dir=<folder>)",
            )

    def open(self, config: dict[str, Any], env: dict[str, Any], *, resume: bool) -> list[str]:
        """Claim the directory for a run.

        Returns:
            On resume, one line `key: old -> new` for every config value that changed; else an empty list.

        Raises:
            RunDirError: it holds a run and `resume` is False, or holds none and `resume` is True.
        """
        if not resume:
            self.check_free()
        elif not self.config_file.exists():
            raise RunDirError(
                f"--resume: {self.root} holds no run",
                "check run.name and run.dir, or leave out --resume to start one",
            )
        changes = _changes(json.loads(self.config_file.read_text()), config) if resume else []
        for folder in (self.logs, self.traces, self.checkpoints, self.weights):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.config_file, orjson.dumps(config, option=orjson.OPT_INDENT_2))
        write_atomic(self.env_file, orjson.dumps(env, option=orjson.OPT_INDENT_2))
        return changes

    def weights_of(self, version: int) -> Path:
        return self.weights / f"v_{version}"

    def checkpoint_of(self, step: int) -> Path:
        return self.checkpoints / f"step_{step}"

    def list_checkpoints(self) -> list[CheckpointState]:
        """Whole checkpoints, oldest first. A folder without `state.json` was never finished and does not count."""
        found = []
        for state_file in self.checkpoints.glob("step_*/state.json"):
            state = json.loads(state_file.read_text())
            found.append(CheckpointState(state["step"], state["version"], state_file.parent, state.get("kl_coef")))
        return sorted(found, key=lambda state: state.step)

    def prune(self, *, keep_checkpoints: int, current_version: int) -> None:
        """Delete checkpoints beyond the newest `keep_checkpoints`, and published weights that nobody can ask for.

        A restarted server loads the current version, and one older may still be loading: two versions stay.
        """
        for state in self.list_checkpoints()[:-keep_checkpoints]:
            shutil.rmtree(state.path, ignore_errors=True)
        for folder in self.weights.glob("v_*"):
            suffix = folder.name.removeprefix("v_")
            if suffix.isdigit() and int(suffix) < current_version - 1:
                shutil.rmtree(folder, ignore_errors=True)

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Add one step's line; a single write, so that a kill leaves at most one torn last line."""
        with self.metrics_file.open("ab") as file:
            file.write(orjson.dumps(metrics) + b"\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines."""
        if not self.metrics_file.exists():
            return []
        rows = []
        for line in self.metrics_file.read_bytes().splitlines():
            try:
                rows.append(orjson.loads(line))
            except orjson.JSONDecodeError:
                continue  # the torn last line of a killed run
        return rows

    def rewind(self, step: int) -> None:
        """Forget what was written after `step`: the resumed run writes it again."""
        kept = [row for row in self.read_metrics() if row["step"] <= step]
        write_atomic(self.metrics_file, b"".join(orjson.dumps(row) + b"\n" for row in kept))
        for folder in self.traces.glob("step_*"):
            suffix = folder.name.removeprefix("step_")
            if suffix.isdigit() and int(suffix) > step:
                shutil.rmtree(folder, ignore_errors=True)

    def write_trace(self, step: int, split: str, trajectories: Iterable[Trajectory]) -> None:
        """Write `traces/step_N/<split>.jsonl`, one trajectory a line."""
        lines = b"".join(
            orjson.dumps(trajectory.to_json(), option=orjson.OPT_SERIALIZE_NUMPY, default=str) + b"\n"
            for trajectory in trajectories
        )
        folder = self.traces / f"step_{step}"
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{split}.jsonl.tmp"
        temporary.write_bytes(lines)
        temporary.replace(folder / f"{split}.jsonl")


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    before, after = dict(_flatten(old)), dict(_flatten(new))
    return [
        f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, "(absent)") != after.get(key, "(absent)")
    ]


def _flatten(data: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
