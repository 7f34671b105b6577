"""Limits by cgroup v2, where the server may make groups: memory, processes and CPU of a sandbox.

A server has such a right if systemd delegated a group to it (`Delegate=yes`), or as root of a
container with cgroups of its own. Without, resource limits and `usage` hold the program; they see
less of what the kernel keeps for it (see docs/sandbox.md).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from functools import cache
from pathlib import Path

from agentloop.errors import ConfigError
from tools.sandbox.settings import SandboxSettings

log = logging.getLogger(__name__)

CONTROLLERS = ("memory", "pids", "cpu")
PERIOD_US = 100_000


class Cgroups:
    """The groups of a server, below `folder`.

    Raises:
        OSError: it may not be used.
    """

    def __init__(self, folder: Path, settings: SandboxSettings) -> None:
        self._settings = settings
        self._folder = folder / f"agentloop-sandbox-{os.getpid()}"
        self._numbers = itertools.count()
        available = (folder / "cgroup.controllers").read_text().split()
        missing = [name for name in CONTROLLERS[:2] if name not in available]
        if missing:
            raise OSError(f"{folder} lacks the controllers {', '.join(missing)}")
        self._controllers = [name for name in CONTROLLERS if name in available]
        enable = " ".join(f"+{name}" for name in self._controllers)
        (folder / "cgroup.subtree_control").write_text(enable)
        self._folder.mkdir(exist_ok=True)
        (self._folder / "cgroup.subtree_control").write_text(enable)

    def add(self, pid: int) -> Cgroup:
        """Put a waiting sandbox into a group of its own."""
        folder = self._folder / str(next(self._numbers))
        folder.mkdir()
        group = Cgroup(folder)
        settings = self._settings
        (folder / "pids.max").write_text(str(settings.max_processes + 2))
        if "cpu" in self._controllers:
            (folder / "cpu.max").write_text(f"{round(settings.cpus * PERIOD_US)} {PERIOD_US}")
        (folder / "cgroup.procs").write_text(str(pid))
        return group

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._folder.rmdir()


class Cgroup:
    """The group of one sandbox."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def limit_memory(self, memory: int) -> None:
        """Limit what all its processes and its files in memory take together, in bytes."""
        (self._folder / "memory.max").write_text(str(memory))
        for name, value in (("memory.swap.max", "0"), ("memory.oom.group", "1")):
            with contextlib.suppress(OSError):  # a kernel without swap accounting
                (self._folder / name).write_text(value)

    @property
    def out_of_memory(self) -> bool:
        with contextlib.suppress(OSError):
            return any(
                line.startswith("oom_kill ") and line.split()[1] != "0"
                for line in (self._folder / "memory.events").read_text().splitlines()
            )
        return False

    def kill(self) -> None:
        with contextlib.suppress(OSError):  # kernels before 5.14 have none
            (self._folder / "cgroup.kill").write_text("1")

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self._folder.rmdir()


def find_cgroups(settings: SandboxSettings) -> Cgroups | None:
    """Return the groups that this server may make, or None.

    Raises:
        ConfigError: `cgroup` names a folder that cannot be used.
    """
    if settings.cgroup == "off":
        return None
    if settings.cgroup != "auto":
        try:
            return Cgroups(Path(settings.cgroup), settings)
        except OSError as exc:
            raise ConfigError(
                f"--cgroup {settings.cgroup} cannot be used: {exc}",
                "give a folder of a cgroup v2 hierarchy that this user may write, with the controllers memory and pids "
                "and without processes of its own; or --cgroup off",
            ) from exc
    try:
        own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        return Cgroups(Path("/sys/fs/cgroup") / own.lstrip("/"), settings)
    except (OSError, StopIteration) as exc:
        _say_unavailable(str(exc))
        return None


@cache
def _say_unavailable(reason: str) -> None:
    """Log it once a process: the check of the start looks for groups, too."""
    log.info("cgroups are not available: limits are enforced by polling")
    log.debug("cgroups: %s", reason)
