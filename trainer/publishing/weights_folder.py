"""The folder of published weights: in memory (tmpfs) on one machine, else in the run directory."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import psutil

from agentloop.errors import ConfigError
from agentloop.files import disk_errors, partial_of, rename_folder
from agentloop.weights.shared import PROGRESS
from trainer.locks import FileLock, is_locked

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # `WeightsFolder.create` makes a folder that only this user can enter
OWNER = "owner.pid"
"""Locked by the run that publishes in the folder, as long as it lives."""

ROOM = 3
"""Versions that must fit: the served one, the previous one, and the one being written."""

KEPT_VERSIONS = 2
"""Version folders to keep: the served one, and the previous one, which may still be loading."""


class WeightsFolder:
    """The folder for the published weights of one run. Made with `create`.

    Attributes:
        path: where versions are published now.
    """

    def __init__(self, run: Path, path: Path, lock: FileLock | None) -> None:
        self._run = run
        self._lock = lock
        self.path = path

    @classmethod
    def create(cls, run: Path, named: Path | None, *, local: bool) -> WeightsFolder:
        """Make the folder, empty. A run that was killed may have left files in it.

        Args:
            run: the `weights` folder of the run directory.
            named: `rollout.publish.folder`; None: a folder in memory, if possible.
            local: whether the server can read this machine's memory.

        Raises:
            ConfigError: the folder belongs to another user, or to a run that is alive.
        """
        path = choose_path(run, named, local=local)
        if path == run:
            return cls(run, path, None)

        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and path.stat().st_uid != os.getuid()):
            raise ConfigError(f"{path} belongs to another user", "name another folder with rollout.publish.folder")
        # Before this run claims memory, free the memory of this user's killed runs.
        _sweep(path.parent)
        if path.exists() and not _is_alive(path):
            shutil.rmtree(path, ignore_errors=True)

        # It gets its name when it is locked: another run that sweeps never sees it unlocked.
        unnamed = path.with_name(f".{path.name}.{os.getpid()}")
        shutil.rmtree(unnamed, ignore_errors=True)
        unnamed.mkdir(mode=0o700)
        lock = FileLock.take(unnamed / OWNER)
        try:
            unnamed.rename(path)
        except OSError as exc:
            lock.release()
            shutil.rmtree(unnamed, ignore_errors=True)
            raise ConfigError(
                f"{path} holds the published weights of a run that is alive",
                "end that run, or name another folder with rollout.publish.folder; if it has ended, delete the folder",
            ) from exc
        return cls(run, path, lock)

    @property
    def passes(self) -> bool:
        """Whether the folder is removed when the run ends."""
        return self.path != self._run

    def fits(self, size: int) -> bool:
        """Whether there is room for all versions of a model of `size` bytes."""
        return shutil.disk_usage(self.path).free > ROOM * size

    def fall_back(self) -> None:
        """Use the run's own folder instead."""
        self._remove()
        self.path = self._run

    def close(self, last: Path | None, name: str) -> None:
        """Keep `last` as `weights/<name>` of the run, and remove the rest.

        Raises:
            DiskError: the disk of the run directory is full; the rest is removed nevertheless.
        """
        kept = self._run / name
        try:
            if self.passes and last is not None and last.is_dir():
                _copy(last, kept)
        finally:
            self._remove()

    def _remove(self) -> None:
        if self.passes:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            self._lock.release()


def _copy(last: Path, kept: Path) -> None:
    """Copy a version's folder, whole or not at all."""
    partial = partial_of(kept)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with disk_errors(kept):
            partial.mkdir(parents=True)
            for file in last.iterdir():  # `shutil.copytree` would hide the error number
                if file.is_file() and file.name not in (PROGRESS, OWNER):
                    shutil.copy2(file, partial / file.name)
            rename_folder(partial, kept)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
        if owner.is_file() and owner.stat().st_uid == os.getuid() and not _is_alive(other):
            shutil.rmtree(other, ignore_errors=True)


def _is_alive(folder: Path) -> bool:
    """Return whether the run that publishes in `folder` lives."""
    owner = folder / OWNER
    if is_locked(owner):
        return True
    # Earlier versions wrote a bare process number and did not lock.
    text = owner.read_text() if owner.is_file() else ""
    return text.isdecimal() and psutil.pid_exists(int(text))
