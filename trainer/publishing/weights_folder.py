"""Where published weights lie: in memory (tmpfs) if trainer and server are on one machine, else in the run's folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import psutil

from agentloop.errors import ConfigError
from agentloop.files import partial_of, rename_folder
from agentloop.weights.shared import PROGRESS

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # the folder is made below for this user alone
OWNER = "owner.pid"
ROOM = 3
"""Versions that have to fit: the one that is served, the one before, and the one that is written."""


class WeightsFolder:
    """The folder of one run; nothing of it is left when the run ends.

    Args:
        run: the run's own `weights` folder.
        named: what the recipe says; None: a folder in memory.
        local: whether the server sees this machine's memory.
    """

    def __init__(self, run: Path, named: Path | None, *, local: bool) -> None:
        self._run = run
        self.path = run
        self._is_ours = False
        if named is not None:
            self.path = named.absolute() / _name_of(run)
        elif local and os.access(SHARED_MEMORY, os.W_OK):
            self.path = SHARED_MEMORY / _name_of(run)

    @property
    def passes(self) -> bool:
        """Whether it goes when the run ends."""
        return self.path != self._run

    def open(self) -> None:
        """Make it, empty: a run that was killed may have left something.

        Raises:
            ConfigError: it belongs to somebody else.
        """
        if not self.passes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_symlink() or (self.path.exists() and self.path.stat().st_uid != os.getuid()):
            raise ConfigError(f"{self.path} is not this user's", "name a folder with rollout.publish.folder")
        shutil.rmtree(self.path, ignore_errors=True)
        self._sweep()
        self.path.mkdir(mode=0o700)
        (self.path / OWNER).write_text(str(os.getpid()))

    def _sweep(self) -> None:
        """Remove what killed runs left in memory, whichever they were."""
        for other in self.path.parent.glob(f"agentloop-{os.getuid()}-*"):
            owner = other / OWNER
            if owner.is_file() and owner.stat().st_uid == os.getuid():
                text = owner.read_text()
                if text.isdecimal() and not psutil.pid_exists(int(text)):
                    shutil.rmtree(other, ignore_errors=True)

    def fits(self, size: int) -> bool:
        """Whether a model of `size` bytes has room in it, as often as it is needed."""
        return shutil.disk_usage(self.path).free > ROOM * size

    def fall_back(self) -> None:
        """Use the run's own folder instead."""
        if self.passes:
            shutil.rmtree(self.path, ignore_errors=True)
        self.path = self._run

    def close(self, last: Path | None, name: str) -> None:
        """Keep `last` as `weights/<name>` of the run, and remove the rest."""
        if not self.passes:
            return
        if last is not None and last.is_dir():
            partial = partial_of(self._run / name)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(last, partial, ignore=shutil.ignore_patterns(PROGRESS))
            rename_folder(partial, self._run / name)
        shutil.rmtree(self.path, ignore_errors=True)


def prune_versions(folder: Path, current: int, kept: int) -> None:
    """Delete `v_N` folders older than the newest `kept` up to `current`."""
    for path in folder.glob("v_*"):
        suffix = path.name.removeprefix("v_")
        if suffix.isdigit() and int(suffix) <= current - kept:
            shutil.rmtree(path, ignore_errors=True)


def _name_of(run: Path) -> str:
    # The same for every start of the same run, so that the next one finds what a killed one left.
    return f"agentloop-{os.getuid()}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12]}"
