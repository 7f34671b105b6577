"""Which runs are on this machine, for messages about one that is not."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from agentloop.text import clean

OUTPUTS = Path("outputs")
"""Where runs are written by default (`run.dir`), relative to the working directory."""

SHOWN = 6
"""Runs that a message names."""

LOOKED_AT = 2_000
"""Entries of a folder that are looked at."""


def found_runs(fix: str, *, beside: Path | None = None) -> str:
    """Return `fix`, followed by the newest runs of `outputs/`.

    Args:
        beside: a path that is not a run; the runs of its folder come after those of `outputs/`.
    """
    folders = [OUTPUTS] if beside is None else [OUTPUTS, beside.parent]
    runs = list(dict.fromkeys(run for folder in folders for run in _runs_of(folder)))
    if not runs:
        return f"{fix}, e.g. outputs/quickstart"
    more = ", ..." if len(runs) > SHOWN else ""
    return f"{fix}; found: {', '.join(clean(run, 200) for run in runs[:SHOWN])}{more}"


def _runs_of(folder: Path) -> list[Path]:
    """Return the run directories of a folder, the newest first; none if it cannot be read."""
    found: list[tuple[float, Path]] = []
    try:
        for entry in islice(folder.iterdir(), LOOKED_AT):
            config = entry / "config" / "resolved.json"
            if config.is_file():
                found.append((config.stat().st_mtime, entry))
    except OSError:
        return []
    return [entry for _, entry in sorted(found, key=lambda pair: (-pair[0], pair[1]))]
