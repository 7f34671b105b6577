"""The server as a process: its port, its parent, its threads, its ready file."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import threading
import time
from pathlib import Path

from agentloop.files import write_atomic
from agentloop.runtime import child

log = logging.getLogger(__name__)

PARENT_CHECK_S = 0.5

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Numerical libraries read these when they are imported, to size their thread pools."""


def write_ready_file(path: Path, url: str) -> None:
    """Announce that the server serves: a reader that sees the file sees all of it."""
    write_atomic(path, json.dumps({"url": url, "pid": os.getpid()}).encode(), durable=False)


def allow_open_files(wanted: int) -> int:
    """Raise this process's limit of open files to `wanted` where that is allowed.

    Returns:
        The limit, at most `wanted`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (OSError, ValueError):
        return soft
    return limit


def die_with_parent(parent: int) -> None:
    """End this process when process `parent` has ended, for any reason.

    The kernel's signal is immediate. A thread covers systems without it, and a parent that is not
    the direct one; it is a thread rather than a task because it must work while a model loads.
    """
    if sys.platform == "linux" and os.getppid() == parent:
        child.die_with_parent()

    def watch() -> None:
        while _alive(parent):
            time.sleep(PARENT_CHECK_S)
        log.error("parent process %d has ended; stopping this server", parent)
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # A killed process that its own parent has not reaped still accepts signals.
    return _state(pid) != "Z"


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
