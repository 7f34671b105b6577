"""`UsageWatch`: what the processes of a sandbox use together, looked at 20 times a second.

Resource limits hold for one process each, and those of files for one file. Together, the processes
of a sandbox could take `processes x memory`. This thread reads the sandbox's own /proc and its file
systems, and stops the program that goes over a limit. With cgroups the kernel limits memory itself;
files are watched in any case.

It reads numbers only, and follows no link that a program could have made.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from pathlib import Path

from tools.sandbox.isolation.bubblewrap import HOME
from tools.sandbox.worker import Worker, own_processes

PERIOD_S = 0.05

FOLDERS = (HOME, "/tmp", "/dev/shm")  # noqa: S108  # the sandbox's own

PAGE = os.sysconf("SC_PAGE_SIZE")

PAGE_TABLES = ("VmPTE:",)
"""The kernel's memory for a process: empty pages over a large space hold nothing else."""


class UsageWatch:
    """Watches the sandboxes that run a program. One thread serves a whole server.

    Args:
        max_files: files of one sandbox.
        max_processes: its processes.
    """

    def __init__(self, max_files: int, max_processes: int) -> None:
        self._max_files = max_files
        self._max_processes = max_processes
        self._loop = asyncio.get_running_loop()
        self._watched: dict[Worker, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sandbox usage", daemon=True)
        self._thread.start()

    def add(self, worker: Worker, memory: int) -> None:
        """Watch a sandbox whose processes may take `memory` bytes together."""
        self._watched[worker] = memory

    def remove(self, worker: Worker) -> None:
        self._watched.pop(worker, None)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(PERIOD_S):
            for worker, memory in list(self._watched.items()):
                reason = self._excess(worker.init, memory)
                if reason is not None:
                    with contextlib.suppress(RuntimeError):  # the loop has ended
                        self._loop.call_soon_threadsafe(worker.stop, reason)

    def _excess(self, init: int, memory: int) -> str | None:
        """Return which limit a sandbox is over, or None."""
        processes = own_processes(init)
        if len(processes) > self._max_processes + 1:
            return "processes"
        # Pages that processes share are counted in each, which is cheap; the kernel divides them
        # fairly, which is slow: it is asked only if the first sum is too large.
        if sum(map(_private, processes)) > memory and sum(map(_proportional, processes)) > memory:
            return "memory"
        return "files" if any(_files(init, folder) > self._max_files for folder in FOLDERS) else None


def _private(process: Path) -> int:
    """Return the bytes that a process holds, without those of files."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        _, resident, of_files, *_ = (process / "statm").read_text().split()
        return (int(resident) - int(of_files)) * PAGE + _kept(process, "RssShmem:", *PAGE_TABLES)
    return 0


def _proportional(process: Path) -> int:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (process / "smaps_rollup").read_text().splitlines()
        sums = {name: int(size.split()[0]) for name, _, size in (line.partition(":") for line in lines[1:]) if size}
        size = sums["Pss_Anon"] + sums["Pss_Shmem"] if "Pss_Anon" in sums else sums.get("Pss", 0)
        return size * 1024 + _kept(process, *PAGE_TABLES)
    return 0


def _kept(process: Path, *names: str) -> int:
    """Return the sum of lines of a process's `status`, in bytes."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (process / "status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(names)) * 1024
    return 0


def _files(init: int, folder: str) -> int:
    with contextlib.suppress(OSError):
        found = os.statvfs(f"/proc/{init}/root{folder}")
        return found.f_files - found.f_ffree
    return 0
