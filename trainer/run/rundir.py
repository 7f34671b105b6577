"""The run directory: its layout, claims on it, and writes that appear whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from agentloop.commands.runs import found_runs
from agentloop.config import CheckpointConfig
from agentloop.errors import RunDirError
from agentloop.files import append_line, real_path, write_atomic
from agentloop.text import finite
from agentloop.trace.store import TraceStore
from trainer.checkpoint_files import GROUPS_FILE, OLD_GROUPS_FILE, BrokenCheckpoint, is_sealed, read_state, verify
from trainer.locks import FileLock, Locked

LOCK = ".lock"
"""Locked while a process writes to the run directory; it names that process."""

FIXED = ("model.path", "trainer.lora.adapters", "lora.adapters")
"""Keys that a resumed run cannot change: optimizer state and reference belong to one model."""

SHOWN_LINES = 3
"""Damaged lines of `metrics.jsonl` that a warning names."""

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
        old = self.path / OLD_GROUPS_FILE
        return old if old.exists() else self.path / GROUPS_FILE


class RunDir:
    """The paths of a run and operations on them.

    outputs/<run>/config/resolved.json  env.json  metrics.jsonl  logs/*.log  finished.json
                  traces/step_N/{train,eval}.parquet  traces/images/  report.html
                  checkpoints/step_N/  weights/v_N/

    Attributes:
        resume_point: after `open`, the checkpoint that the run continues from.
    """

    def __init__(self, root: Path) -> None:
        self.root = real_path(root)
        self.config_file = self.root / "config" / "resolved.json"
        self.env_file = self.root / "env.json"
        self.metrics_file = self.root / "metrics.jsonl"
        self.logs = self.root / "logs"
        self.traces = self.root / "traces"
        self.checkpoints = self.root / "checkpoints"
        self.weights = self.root / "weights"
        self.finished_file = self.root / "finished.json"
        self.resume_point: CheckpointState | None = None

    @property
    def holds_run(self) -> bool:
        """Whether the folder holds results. A start that failed before them may be repeated."""
        return self.metrics_file.exists() or bool(self.checkpoint_folders())

    @contextlib.contextmanager
    def claimed(self, *, resume: bool = False, warn: Callable[[str], None] = lambda _: None) -> Iterator[None]:
        """Keep other processes out of the directory within the block.

        The directory is created, and removed again if the block leaves nothing in it.

        Args:
            warn: called if the file system has no locks.

        Raises:
            RunDirError: another process uses it, it cannot be used, or `resume` is True and it does
                not hold a run.
        """
        if resume:
            self._check_resumable()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock.take(self.root / LOCK)
        except Locked as exc:
            stop = f"kill {exc.holder.pid}" if exc.holder.pid is not None else "end that process"
            raise RunDirError(
                f"{self.root} is in use by {exc.holder}",
                f"wait until it ends, or stop it: {stop}; for a second run give another name: run.name=<name>",
            ) from None
        except OSError as exc:
            raise RunDirError(
                f"the run directory {self.root} cannot be used: {exc.strerror} ({exc.filename or LOCK})",
                "set run.dir to a folder that can be made and written",
            ) from exc

        if not lock.supported:
            warn(f"the file system of {self.root} has no locks: start no second process on this run directory")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # it was removed, or another process has come in
                empty = [path.name for path in self.root.iterdir()] == [LOCK]
                lock.release(remove=empty)
                if empty:
                    self.root.rmdir()
            lock.release()

    def _check_resumable(self) -> None:
        if not self.config_file.exists() and not self.holds_run:
            raise RunDirError(
                f"--resume: {self.root} does not hold a run",
                found_runs(
                    "start a new run without --resume, or set run.name or run.dir to one that was started",
                    beside=self.root,
                ),
            )

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

    def open(
        self, config: dict[str, Any], env: dict[str, Any], *, resume: bool, warn: Callable[[str], None] = lambda _: None
    ) -> list[str]:
        """Prepare the directory for a run and, on resume, choose the checkpoint to continue from.

        Args:
            warn: called with each damage that the run can continue from.

        Returns:
            on resume, a line `key: old -> new` for every changed config value; else an empty list.

        Raises:
            RunDirError: it holds a run and `resume` is False; it holds no run and `resume` is True;
                no checkpoint is intact; or a key changed that a resumed run cannot change.
        """
        if resume:
            self._check_resumable()
        else:
            self.check_free()

        for folder in (self.logs, self.traces, self.checkpoints, self.weights):
            folder.mkdir(parents=True, exist_ok=True)
        self._clear_partial_checkpoints()
        self.resume_point = self._choose_checkpoint(warn) if resume else None

        before = self.read_config() if resume else None
        if resume and before is None:
            warn(f"{self.config_file} is missing or damaged: changes of the configuration are not listed")
        changes = _changes(before, config) if before is not None else {}
        self._check_changes(changes)

        self.finished_file.unlink(missing_ok=True)
        write_atomic(self.config_file, orjson.dumps(config, option=orjson.OPT_INDENT_2))
        write_atomic(self.env_file, orjson.dumps(env, option=orjson.OPT_INDENT_2))
        return [f"{key}: {old} -> {new}" for key, (old, new) in changes.items()]

    def read_config(self) -> dict[str, Any] | None:
        """Return the configuration of the run; None if it is missing or damaged."""
        config = _read_object(self.config_file)
        return config or None

    def mark_finished(self, steps: int) -> None:
        """Record that the run reached its end: nothing is left to do for a resumed run."""
        write_atomic(self.finished_file, orjson.dumps({"steps": steps}))

    def finished_steps(self) -> int | None:
        """Return the steps of a run that reached its end; None if it did not."""
        steps = _read_object(self.finished_file).get("steps")
        return steps if isinstance(steps, int) else None

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
        if self.resume_point is None:
            return  # the run starts over, so any key may change
        groups = self.resume_point.groups_file
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
        """Return the checkpoints with a readable `state.json`, oldest first."""
        found = []
        for folder in self.checkpoint_folders():
            with contextlib.suppress(BrokenCheckpoint):
                found.append(_state_of(folder))
        return sorted(found, key=lambda state: state.step)

    def checkpoint_folders(self) -> list[Path]:
        """Return the folders named `step_N`, oldest first."""
        steps = (path.name.removeprefix("step_") for path in self.checkpoints.glob("step_*"))
        # `step_04` is not one of ours: a copy that somebody made.
        ours = (int(step) for step in steps if step.isdecimal() and step == str(int(step)))
        return [self.checkpoint_of(step) for step in sorted(ours)]

    def _choose_checkpoint(self, warn: Callable[[str], None]) -> CheckpointState | None:
        """Return the newest intact checkpoint; None if there is none at all. Move newer ones aside.

        Raises:
            RunDirError: there are checkpoints, and all of them are damaged.
        """
        broken: list[BrokenCheckpoint] = []
        chosen = None
        for folder in reversed(self.checkpoint_folders()):
            try:
                chosen = self._intact(folder, warn)
                break
            except BrokenCheckpoint as exc:
                broken.append(exc)

        if broken and chosen is None:
            raise RunDirError(
                f"--resume: no checkpoint of {self.root} is intact:\n  - "
                + "\n  - ".join(f"{exc.folder.name}: {exc.fault}" for exc in broken),
                f"restore the files from a copy; or move {self.checkpoints} away, and --resume starts over",
            )
        for damage in broken:
            # Moved, because a damaged newest checkpoint would push out the intact ones.
            assert chosen is not None
            aside = damage.folder.with_name(f"{damage.folder.name}.damaged")
            if aside.is_symlink() or aside.is_file():
                aside.unlink()
            shutil.rmtree(aside, ignore_errors=True)
            damage.folder.rename(aside)
            warn(f"{damage.message}. It is now {aside.name}, and the run goes on from step {chosen.step}")
        return chosen

    def _intact(self, folder: Path, warn: Callable[[str], None]) -> CheckpointState:
        """Verify a checkpoint and return its state.

        Raises:
            BrokenCheckpoint: it is damaged.
        """
        for name in verify(folder):
            path = folder / name
            path.replace(path.with_name(f"{name}.damaged"))
            warn(f"{path} is damaged: its groups are sampled again")
        if not is_sealed(read_state(folder)):
            warn(f"{folder} has no checksums (an earlier version wrote it): its files are not verified")
        return _state_of(folder)

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
        append_line(self.metrics_file, orjson.dumps(metrics))

    def amend_metrics(self, metrics: dict[str, Any]) -> None:
        """Add metrics to the last line of their step, atomically."""
        rows = self.read_metrics()
        row = next((row for row in reversed(rows) if row["step"] == metrics["step"]), None)
        if row is None:
            self.append_metrics(metrics)
            return
        row.update(metrics)
        self._write_metrics(rows)

    def read_metrics(self, on_odd: Callable[[int, str], None] = lambda number, why: None) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`.

        Args:
            on_odd: called with number and fault of each line that is left out.
        """
        if not self.metrics_file.exists():
            return []
        rows = []
        for number, line in enumerate(self.metrics_file.read_bytes().splitlines(), 1):
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                on_odd(number, "is not JSON, perhaps torn by a kill")
                continue
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                on_odd(number, "has no step")
            elif wrong := [key for key in row if "/" in key and not isinstance(row[key], int | float | None)]:
                on_odd(number, f"has no number at {wrong[0]}")
            else:
                rows.append(row)
        return rows

    def rewind(self, step: int, warn: Callable[[str], None] = lambda _: None) -> None:
        """Remove everything written after `step`: a resumed run writes it again.

        Args:
            warn: called if lines of `metrics.jsonl` are lost.
        """
        odd: list[str] = []
        rows = self.read_metrics(lambda number, why: odd.append(f"line {number} {why}"))
        if odd:
            more = f" and {len(odd) - SHOWN_LINES} more" if len(odd) > SHOWN_LINES else ""
            warn(f"{self.metrics_file} is damaged: {'; '.join(odd[:SHOWN_LINES])}{more}. The other lines are kept")
        kept = [row for row in rows if row["step"] <= step]
        self._write_metrics(kept)
        TraceStore(self.root).rewind(step)

    def _write_metrics(self, rows: Iterable[dict[str, Any]]) -> None:
        write_atomic(self.metrics_file, b"".join(orjson.dumps(row) + b"\n" for row in rows))


def _state_of(folder: Path) -> CheckpointState:
    """Read the state of a checkpoint.

    Raises:
        BrokenCheckpoint: its `state.json` is damaged.
    """
    state = read_state(folder)
    if folder.name != f"step_{state['step']}":
        raise BrokenCheckpoint(folder, f"it holds step {state['step']}: the folder was copied or renamed")
    return CheckpointState(state["step"], state["version"], folder, finite(state.get("kl_coef")))


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is none."""
    try:
        data = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return data if isinstance(data, dict) else {}


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
