"""Name what is missing, cut or left over in the traces of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from agentloop.errors import TraceError
from agentloop.trace.store.files import PARQUET, leftovers, list_files


@dataclass(frozen=True, slots=True)
class Problem:
    """A file of the store that is missing, cut, left over or of the old form.

    Attributes:
        fault: what is wrong with it.
        fix: what to do.
    """

    path: Path
    fault: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path} {self.fault} ({self.fix})"


def find_problems(run_dir: Path) -> list[Problem]:
    """Return the problems of a run's traces. Reads the ends of files, not their rows."""
    traces = run_dir / "traces"
    files = list_files(traces)
    found = []
    for file in files:
        if file.old:
            continue
        try:
            file.metadata()
        except TraceError as exc:
            fault = exc.message.removeprefix(str(file.path)).strip()
            found.append(Problem(file.path, fault, exc.hint or "delete it"))

    if old := sum(file.old for file in files):
        fault = f"has {old} files in the old JSON form, which is slow to read"
        found.append(Problem(traces, fault, f"agentloop trace import {run_dir}"))

    partial = leftovers(traces)
    for path in partial:
        fault = "is not complete: it is being written, or the process was killed while it was"
        found.append(Problem(path, fault, "after a kill: agentloop train --resume removes it"))

    present = {file.step for file in files if file.split == "train"}
    present |= {int(path.parent.name.removeprefix("step_")) for path in partial if path.name.startswith("train")}
    for step in _traced_steps(run_dir):
        if step not in present:
            path = traces / f"step_{step}" / f"train{PARQUET}"
            found.append(Problem(path, "is missing, although the step was trained", "it cannot be restored"))
    return found


def _traced_steps(run_dir: Path) -> Iterator[int]:
    """Yield the trained steps whose trace was due."""
    every = _setting(run_dir / "config" / "resolved.json", "trace", "train_every")
    if not isinstance(every, int) or every < 1:
        return
    with contextlib.suppress(OSError):
        for line in (run_dir / "metrics.jsonl").read_bytes().splitlines():
            with contextlib.suppress(orjson.JSONDecodeError):
                row = orjson.loads(line)
                step = row.get("step") if isinstance(row, dict) and "reward/mean" in row else None
                if isinstance(step, int) and (step == 1 or step % every == 0):
                    yield step


def _setting(path: Path, *keys: str) -> Any:
    value: Any = None
    with contextlib.suppress(OSError, orjson.JSONDecodeError):
        value = orjson.loads(path.read_bytes())
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
