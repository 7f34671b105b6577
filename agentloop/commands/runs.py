"""Which runs are on this machine, for messages about one that is not."""

from __future__ import annotations

import contextlib
from itertools import islice
from pathlib import Path

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


def is_run(folder: Path) -> bool:
    """Whether a directory is that of a run, of whatever kind."""
    return _begun(folder) is not None


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
