"""The folder of published weights: in memory (tmpfs) on one machine, else in the run directory."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import psutil

from agentloop.errors import ConfigError
from agentloop.files import partial_of, rename_folder
from agentloop.weights.shared import PROGRESS

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # `WeightsFolder.create` makes a folder that only this user can enter
OWNER = "owner.pid"

ROOM = 3
"""Versions that must fit: the served one, the previous one, and the one being written."""

KEPT_VERSIONS = 2
"""Version folders to keep: the served one, and the previous one, which may still be loading."""


class WeightsFolder:
    """The folder for the published weights of one run. Made with `create`.

    Attributes:
        path: where versions are published now.
    """

    def __init__(self, run: Path, path: Path) -> None:
        self._run = run
        self.path = path

    @classmethod
    def create(cls, run: Path, named: Path | None, *, local: bool) -> WeightsFolder:
        """Make the folder, empty. A run that was killed may have left files in it.

        Args:
            run: the `weights` folder of the run directory.
            named: `rollout.publish.folder`; None: a folder in memory, if possible.
            local: whether the server can read this machine's memory.

        Raises:
            ConfigError: the folder belongs to another user.
        """
        path = choose_path(run, named, local=local)
        if path != run:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink() or (path.exists() and path.stat().st_uid != os.getuid()):
                raise ConfigError(f"{path} belongs to another user", "name another folder with rollout.publish.folder")

            shutil.rmtree(path, ignore_errors=True)
            # Before this run claims memory, free the memory of this user's killed runs.
            _sweep(path.parent)

            path.mkdir(mode=0o700)
            (path / OWNER).write_text(str(os.getpid()))
        return cls(run, path)

    @property
    def passes(self) -> bool:
        """Whether the folder is removed when the run ends."""
        return self.path != self._run

    def fits(self, size: int) -> bool:
        """Whether there is room for all versions of a model of `size` bytes."""
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


def choose_path(run: Path, named: Path | None, *, local: bool) -> Path:
    """Return the folder to publish in; arguments as in `WeightsFolder.create`."""
    # The same name at each start of a run, so that a restart finds the files of a killed run.
    name = f"agentloop-{os.getuid()}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12]}"
    if named is not None:
        return named.absolute() / name
    if local and os.access(SHARED_MEMORY, os.W_OK):
        return SHARED_MEMORY / name
    return run


def version_folder(folder: Path, version: int) -> Path:
    return folder / f"v_{version}"


def prune_versions(folder: Path, current: int) -> None:
    """Delete the `v_N` folders of all but the newest `KEPT_VERSIONS` versions up to `current`."""
    for path in folder.glob("v_*"):
        suffix = path.name.removeprefix("v_")
        if suffix.isdigit() and int(suffix) <= current - KEPT_VERSIONS:
            shutil.rmtree(path, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove files that killed runs of this user left in `folder`."""
    for other in folder.glob(f"agentloop-{os.getuid()}-*"):
        owner = other / OWNER
        if owner.is_file() and owner.stat().st_uid == os.getuid():
            text = owner.read_text()
            if text.isdecimal() and not psutil.pid_exists(int(text)):
                shutil.rmtree(other, ignore_errors=True)
