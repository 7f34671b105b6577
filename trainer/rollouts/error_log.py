"""Exceptions of user code: the first of each kind on the console, all of them in a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentloop.faults import Fault
from agentloop.files import json_line

MOST_SHOWN = 20
"""Kinds that the console shows; more of them are only in the file."""

MOST_BYTES = 16 * 2**20
"""Size of the file after which only new kinds are written, and the half of what it may have."""


class ErrorLog:
    """Write exceptions to `logs/errors.jsonl`, one a line, and show the first of each kind.

    A line has `episode`, `row`, `kind` (type and place), `count` (how often this kind has occurred
    so far in this process), `source`, `error`, `where`, and for the first of a kind `traceback`.

    Args:
        path: the file, which is made with the first exception; a resumed run appends.
        show: prints a warning.
    """

    def __init__(self, path: Path, show: Callable[[str], None]) -> None:
        self._path = path
        self._show = show
        self._counts: Counter[str] = Counter()
        self._broken = False

    def __call__(self, fault: Fault, row: str, episode: str) -> None:
        """Record an exception of an episode. Never raises."""
        kind, episode = fault.kind, _named(episode)
        self._counts[kind] += 1
        count = self._counts[kind]
        if count == 1 and len(self._counts) <= MOST_SHOWN:
            where = f"row {row}, {episode}; shown once, all are in logs/{self._path.name}"
            if not fault.source.startswith("the tool"):  # which does not fail an episode
                where += f"; its episodes: agentloop trace list {self._path.parent.parent} --status failed"
            self._show(f"{fault.source} raised {_short(fault.error)} ({where})\n{fault.traceback}")

        line: dict[str, Any] = {"episode": episode, "row": row, "kind": kind, "count": count, "source": fault.source}
        line |= {"error": fault.error, "where": fault.where}
        if count == 1:
            line["traceback"] = fault.traceback
        self._append(json_line(line), first=count == 1)

    def _append(self, line: bytes, *, first: bool) -> None:
        if self._broken:
            return
        try:
            with self._path.open("ab") as file:
                if file.tell() + len(line) <= (2 * MOST_BYTES if first else MOST_BYTES):
                    file.write(line)
        except OSError as exc:
            self._broken = True
            self._show(f"{self._path} cannot be written: {exc}; further exceptions are only in the traces")


def _named(episode: str) -> str:
    """Return `group g3, sample 1` of `g3/1`, which no command takes: the step is not known here."""
    group, slash, sample = episode.rpartition("/")
    return f"group {group}, sample {sample}" if slash else episode


def _short(error: str) -> str:
    return error if len(error) <= 500 else error[:500] + " ..."
