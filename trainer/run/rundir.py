"""The run directory: its layout, claims on it, and writes that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from agentloop.config import CheckpointConfig
from agentloop.errors import RunDirError
from agentloop.exact_json import json_line
from agentloop.files import write_atomic
from agentloop.types import Trajectory

FIXED = ("model.path",)
"""Keys that a resumed run cannot change: optimizer state and reference belong to one model."""

FIXED_WITH_GROUPS = ("rollout.batch_size", "rollout.group_size")
"""Keys fixed while a checkpoint holds finished groups: a group's index determines its step."""


@dataclass(frozen=True)
class CheckpointState:
    """The state that a checkpoint records beside the tensors."""

    step: int
    version: int
    path: Path
    kl_coef: float | None = None

    @property
    def groups_file(self) -> Path:
        """The file of finished groups that were not trained yet (`trainer.rollouts.group_file`)."""
        return self.path / "groups.jsonl"


class RunDir:
    """The paths of a run and operations on them.

    outputs/<run>/config/resolved.json  env.json  metrics.jsonl  logs/*.log
                  traces/step_N/{train,eval}.jsonl checkpoints/step_N/   weights/v_N/   report.html
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
        """Whether the folder holds results. A start that failed before them may be repeated."""
        return self.metrics_file.exists() or bool(self.list_checkpoints())

    def check_free(self) -> None:
        """Refuse to start a new run over an old one.

        Raises:
            RunDirError: it holds a run.
        """
        if self.holds_run:
            raise RunDirError(
                f"{self.root} already holds a run",
                "continue it with --resume, or give this run another name: run.name=<name> (or run.dir=<folder>)",
            )

    def check_writable(self) -> None:
        """Refuse, before anything is loaded, a folder that cannot be made or written.

        Raises:
            RunDirError: names the folder and the reason.
        """
        made: list[Path] = []
        try:
            for folder in (*reversed(self.root.parents), self.root):
                if not folder.is_dir():
                    folder.mkdir()
                    made.append(folder)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except FileExistsError as exc:  # mkdir where a file is
            raise RunDirError(
                f"run directory {self.root}: {exc.filename} is a file", "set run.dir, or run.name, to another folder"
            ) from exc
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "strerror", None) or exc
            raise RunDirError(
                f"run directory {self.root} cannot be written: {reason}", "set run.dir, or run.name, to another folder"
            ) from exc
        finally:
            for folder in reversed(made):
                with contextlib.suppress(OSError):  # another run has written into it meanwhile
                    folder.rmdir()

    def open(self, config: dict[str, Any], env: dict[str, Any], *, resume: bool) -> list[str]:
        """Claim the directory for a run.

        Returns:
            on resume, a line `key: old -> new` for every changed config value; else an empty list.

        Raises:
            RunDirError: it holds a run and `resume` is False; it holds no run and `resume` is True;
                or a key changed that a resumed run cannot change.
        """
        if not resume:
            self.check_free()
        elif not self.config_file.exists():
            raise RunDirError(
                f"--resume: {self.root} does not hold a run",
                "check run.name and run.dir, or start a new run without --resume",
            )

        changes = _changes(json.loads(self.config_file.read_text()), config) if resume else {}
        self._check_changes(changes)

        for folder in (self.logs, self.traces, self.checkpoints, self.weights):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.config_file, orjson.dumps(config, option=orjson.OPT_INDENT_2))
        write_atomic(self.env_file, orjson.dumps(env, option=orjson.OPT_INDENT_2))
        self._clear_partial_checkpoints()
        return [f"{key}: {old} -> {new}" for key, (old, new) in changes.items()]

    def _clear_partial_checkpoints(self) -> None:
        """Remove what a run killed while saving left; keep the checkpoint that it was replacing."""
        for hidden in self.checkpoints.glob(".step_*"):
            place = self.checkpoints / hidden.name.removeprefix(".").split(".")[0]
            if hidden.suffix == ".stale" and not place.exists():
                hidden.rename(place)
            elif hidden.is_dir():
                shutil.rmtree(hidden, ignore_errors=True)
            else:
                hidden.unlink()

    def _check_changes(self, changes: dict[str, tuple[Any, Any]]) -> None:
        checkpoints = self.list_checkpoints()
        if not checkpoints:
            return  # the run starts over, so any key may change
        groups = checkpoints[-1].groups_file
        for key in (*FIXED, *(FIXED_WITH_GROUPS if groups.exists() else ())):
            if key in changes:
                old, new = changes[key]
                way_out = "start a new run: run.name=<name>"
                if key in FIXED_WITH_GROUPS:
                    way_out = f"delete {groups} to sample its groups again"
                raise RunDirError(
                    f"--resume: {key} was {old} and is now {new}; a resumed run cannot change it",
                    f"set {key}={old}, or {way_out}",
                )

    def checkpoint_of(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.checkpoints / f"step_{step}"

    def list_checkpoints(self) -> list[CheckpointState]:
        """Return complete checkpoints (those with a `state.json`), oldest first."""
        found = []
        for state_file in self.checkpoints.glob("step_*/state.json"):
            state = json.loads(state_file.read_text())
            found.append(CheckpointState(state["step"], state["version"], state_file.parent, state.get("kl_coef")))
        return sorted(found, key=lambda state: state.step)

    def last_checkpoint(self) -> CheckpointState | None:
        """Return the newest complete checkpoint; None if there is none."""
        found = self.list_checkpoints()
        return found[-1] if found else None

    def prune_checkpoints(self, config: CheckpointConfig) -> None:
        """Delete checkpoints that are neither among the newest nor among the best."""
        if older := self.list_checkpoints()[: -config.keep]:
            best = self.best_checkpoints(config)
            for state in older:
                if state not in best:
                    shutil.rmtree(state.path, ignore_errors=True)

    def best_checkpoints(self, config: CheckpointConfig) -> list[CheckpointState]:
        """Return the `keep_best` best checkpoints, best first; the newer one wins a tie."""
        if not config.keep_best:
            return []
        scores = {
            row["step"]: row[config.best_metric]
            for row in self.read_metrics()
            if isinstance(row.get(config.best_metric), (int, float))
        }

        sign = 1.0 if config.best_is == "highest" else -1.0
        scored = [state for state in self.list_checkpoints() if state.step in scores]
        scored.sort(key=lambda state: (sign * scores[state.step], state.step), reverse=True)
        return scored[: config.keep_best]

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Append one line in a single write, so that a kill leaves at most one torn last line."""
        with self.metrics_file.open("ab") as file:
            file.write(orjson.dumps(metrics) + b"\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all complete lines."""
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
        """Remove everything written after `step`: a resumed run writes it again."""
        kept = [row for row in self.read_metrics() if row["step"] <= step]
        write_atomic(self.metrics_file, b"".join(orjson.dumps(row) + b"\n" for row in kept))

        for folder in self.traces.glob("step_*"):
            suffix = folder.name.removeprefix("step_")
            if suffix.isdigit() and int(suffix) > step:
                shutil.rmtree(folder, ignore_errors=True)

    def write_trace(self, step: int, split: str, trajectories: Iterable[Trajectory]) -> None:
        """Write `traces/step_N/<split>.jsonl` atomically, one trajectory a line."""
        lines = b"".join(json_line(trajectory.to_json()) for trajectory in trajectories)
        write_atomic(self.traces / f"step_{step}" / f"{split}.jsonl", lines, durable=False)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return old and new value of each key that differs."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    both = {key: (before.get(key, "(absent)"), after.get(key, "(absent)")) for key in before.keys() | after.keys()}
    return {key: both[key] for key in sorted(both) if both[key][0] != both[key][1]}


def _flatten(data: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
