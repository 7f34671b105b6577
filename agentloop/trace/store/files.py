"""The trace files of a run directory: `traces/step_N/{train,eval}.parquet`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from agentloop.errors import DiskError, TraceError
from agentloop.trace.record import SPLITS
from agentloop.trace.store.exact_json import load
from agentloop.trace.store.schema import FORMAT, METADATA_KEY

PARQUET, OLD = ".parquet", ".jsonl"
LARGEST_STEP = re.compile(r"0|[1-9][0-9]{0,17}")
"""What a step's number looks like: one that 64 bits hold."""

TEMPORARY = ".tmp"
"""Ends the name of a file that is being written."""


@dataclass(frozen=True, order=True, slots=True)
class TraceFile:
    """One trace file; `old` is the JSON form that earlier versions wrote."""

    step: int
    split: str
    path: Path

    @property
    def old(self) -> bool:
        return self.path.suffix == OLD

    def open(self) -> pq.ParquetFile:
        """Open a parquet file.

        Raises:
            TraceError: it is missing, cut or of another format.
        """
        try:
            file = pq.ParquetFile(self.path, memory_map=False)
        except FileNotFoundError:
            raise TraceError(
                f"{self.path} is missing", "see `agentloop trace list` for the steps that are there"
            ) from None
        except (OSError, pa.ArrowException) as exc:
            raise TraceError(f"{self.path} is cut or damaged: {exc}", "restore it from a copy, or delete it") from exc
        found = _metadata(file)
        if found.get("format") != FORMAT:
            raise TraceError(
                f"{self.path} has format {found.get('format')!r}, which is not {FORMAT}",
                "read it with the version of agentloop that wrote it",
            )
        return file

    def metadata(self) -> dict[str, Any]:
        """Return what the writer recorded about the file: `format`, `left_out_groups`, ...

        Raises:
            TraceError: as `open`.
        """
        with self.open() as file:
            return _metadata(file)


@contextmanager
def row_errors(file: TraceFile) -> Iterator[None]:
    """Turn what rows of a damaged or foreign file raise in the block into a `TraceError`."""
    try:
        yield
    except (TraceError, DiskError, MemoryError):
        raise
    except Exception as exc:  # a row may hold anything
        raise TraceError(
            f"{file.path} holds a row that cannot be read: {type(exc).__name__}: {str(exc)[:200]}",
            "restore it from a copy, or delete it",
        ) from exc


def _metadata(file: pq.ParquetFile) -> dict[str, Any]:
    text = (file.schema_arrow.metadata or {}).get(METADATA_KEY)
    try:
        data = load(text.decode()) if text else {}
    except ValueError:
        data = {}
    return data if isinstance(data, dict) else {}


def step_folders(traces: Path) -> dict[int, Path]:
    """Return the folders `step_N` by step, in order."""
    found = {}
    for folder in traces.glob("step_*"):
        suffix = folder.name.removeprefix("step_")
        if LARGEST_STEP.fullmatch(suffix) and folder.is_dir():
            found[int(suffix)] = folder
    return dict(sorted(found.items()))


def list_files(traces: Path, split: str | None = None) -> list[TraceFile]:
    """Return the trace files by step and split; the old form only where there is no parquet."""
    found = []
    for step, folder in step_folders(traces).items():
        for name in SPLITS if split is None else (split,):
            for suffix in (PARQUET, OLD):
                path = folder / f"{name}{suffix}"
                if path.is_file():
                    found.append(TraceFile(step, name, path))
                    break
    return found


def leftovers(traces: Path) -> list[Path]:
    """Return temporary files that a killed write left."""
    folders = [*step_folders(traces).values(), traces / "images"]
    return sorted(path for folder in folders for path in folder.glob(f"*{TEMPORARY}"))
