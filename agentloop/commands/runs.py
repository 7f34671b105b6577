"""Which runs are on this machine, for messages about a path that is not one."""

from __future__ import annotations

import contextlib
from itertools import islice
from pathlib import Path

from agentloop.errors import TraceError
from agentloop.files import is_dir, is_file
from agentloop.text import clean

OUTPUTS = Path("outputs")
"""Where runs are written by default (`run.dir`), relative to the working directory."""

SHOWN = 6
"""Runs that a message names."""

LOOKED_AT = 2_000
"""Entries of folders that a search looks at."""

DEEPEST = 3
"""Levels below a folder at which its runs are found: recipes write outputs/<name>/<part>/run."""


def found_runs(fix: str, *, beside: Path | None = None) -> str:
    """Return `fix`, followed by the newest runs of `outputs/`.

    Args:
        beside: a path that is not a run. If there are runs below it, one of them is meant, and they
            alone are named; else, the runs of its folder come after those of `outputs/`.
    """
    runs = [] if beside is None else _runs_of(beside, DEEPEST)
    if not runs:
        runs = _runs_of(OUTPUTS, DEEPEST) + ([] if beside is None else _runs_of(beside.parent, 1))
    runs = list(dict.fromkeys(runs))
    if not runs:
        return f"{fix}, e.g. outputs/quickstart"
    more = ", ..." if len(runs) > SHOWN else ""
    return f"{fix}; found: {', '.join(clean(run, 200) for run in runs[:SHOWN])}{more}"


def check_is_run(path: Path) -> None:
    """Check that a path can be the directory of a run or an evaluation.

    Raises:
        TraceError: it does not exist, is a file, a folder of runs, or inside a run; names the runs.
    """
    if is_run(path):
        return
    shown = clean(path, 300)
    inside = _runs_of(path, DEEPEST)
    if inside:
        more = ", ..." if len(inside) > SHOWN else ""
        raise TraceError(
            f"{shown} is a folder of runs",
            f"give one of them: {', '.join(clean(run, 200) for run in inside[:SHOWN])}{more}",
        )
    above, exists = run_above(path), is_dir(path) or is_file(path)
    if above is not None:
        raise TraceError(
            f"{shown} is inside a run" if exists else f"{shown} does not exist", f"give the run: {clean(above, 300)}"
        )
    if not is_dir(path):
        raise TraceError(
            f"{shown} {'is a file' if exists else 'does not exist'}",
            found_runs("give the directory of a run", beside=path),
        )


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a run or an evaluation, of an earlier version too."""
    if is_file(path / "config" / "resolved.json") or is_file(path / "eval.json"):
        return True
    try:
        return any(entry.name.startswith("step_") for entry in islice((path / "traces").iterdir(), LOOKED_AT))
    except OSError:
        return False


def run_above(path: Path) -> Path | None:
    """Return the run that a path is in; None: it is in none."""
    return next((parent for parent in (*path.parents, *path.absolute().parents) if is_run(parent)), None)


def _runs_of(folder: Path, depth: int) -> list[Path]:
    """Return the run directories up to `depth` levels below a folder, the newest first, as far as
    they can be read."""
    found: list[tuple[float, Path]] = []
    level, left = [folder], LOOKED_AT
    for _ in range(depth):
        folders: list[Path] = []
        for each in level:
            with contextlib.suppress(OSError, ValueError):  # a name that no file can have
                for entry in islice(each.iterdir(), left):
                    left -= 1
                    if (begun := _begun(entry)) is not None:
                        found.append((begun, entry))
                    elif entry.is_dir():
                        folders.append(entry)
        level = folders
    return [entry for _, entry in sorted(found, key=lambda pair: (-pair[0], pair[1]))]


def _begun(folder: Path) -> float | None:
    """Return when a run began in a directory; None: it is not that of a run."""
    try:
        return (folder / "config" / "resolved.json").stat().st_mtime
    except OSError:
        return None
