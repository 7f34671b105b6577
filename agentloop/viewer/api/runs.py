"""Find runs: a run directory, or the run directories in a folder, as they appear."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from agentloop.files import is_dir, real_path
from agentloop.viewer.api.run import Run, is_run

DEEPEST = 3
"""Levels of folders below a root in which runs are looked for."""

MOST_RUNS = 2_000
MOST_FOLDERS = 20_000
"""Runs that are listed, and folders that are looked at."""

SEARCH_EVERY_S = 1.0
"""Folders are not read again within this time."""


class Runs:
    """The runs below some roots. A run keeps its id as long as the server runs.

    Symbolic links below a root are not followed, so that nothing outside of the roots is served.

    Args:
        roots: run directories and folders of run directories; none needs to exist yet.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = [real_path(root) for root in roots]
        self._lock = threading.Lock()
        self._runs: dict[str, Run] = {}
        self._ids: dict[Path, str] = {}
        self._searched = -SEARCH_EVERY_S

    def all(self) -> list[Run]:
        """Return the runs that are there now, the latest first."""
        self._search()
        with self._lock:
            return sorted(self._runs.values(), key=lambda run: (-(run.changed or 0.0), run.id))

    def get(self, run_id: str) -> Run | None:
        """Return a run; None if there is none of this id."""
        with self._lock:
            found = self._runs.get(run_id)
        if found is None or not is_run(found.path):
            self._search()
            with self._lock:
                found = self._runs.get(run_id)
        return found

    def close(self) -> None:
        """Close the indices of all runs."""
        with self._lock:
            for run in self._runs.values():
                run.close()
            self._runs.clear()

    def _search(self) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._searched < SEARCH_EVERY_S:
                return
            self._searched = now
            found = dict(self._found())
            for run_id in self._runs.keys() - found.keys():
                self._runs.pop(run_id).close()
            for run_id, path in found.items():
                if run_id not in self._runs:
                    self._runs[run_id] = Run(run_id, path)

    def _found(self) -> Iterator[tuple[str, Path]]:
        """Yield ids and paths, each path once."""
        seen: set[Path] = set()
        for root in self._roots:
            folders = [MOST_FOLDERS]
            for path in sorted(_below(root, DEEPEST, folders)):
                if path not in seen and len(seen) < MOST_RUNS:
                    seen.add(path)
                    yield self._id(root, path), path

    def _id(self, root: Path, path: Path) -> str:
        """Return the id of a run: its name, with those of the folders below the root before it."""
        if path not in self._ids:
            raw = root.name if path == root else ":".join(path.relative_to(root).parts)
            name = os.fsencode(raw).decode("utf-8", "replace").replace("/", ":") or "run"
            if name != raw or name in self._ids.values():
                name += "~" + hashlib.sha256(os.fsencode(path)).hexdigest()[:6]
            self._ids[path] = name
        return self._ids[path]


def _below(folder: Path, depth: int, left: list[int]) -> Iterator[Path]:
    """Yield the run directories in a folder; there are no runs within a run."""
    if is_run(folder):
        yield folder
        return
    if depth == 0 or not is_dir(folder):
        return
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if _is_folder(entry)]
    except OSError:
        return
    for name in sorted(names):
        left[0] -= 1
        if left[0] < 0:
            return
        yield from _below(folder / name, depth - 1, left)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
    except OSError:
        return False
