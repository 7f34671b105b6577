"""`locked`: one process or thread at a time, by `flock` on a file; the others wait a bounded time.

The kernel frees such a lock when its holder ends, however that happens.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of file systems that have no locks. There nothing is locked."""

LOOK_S = 0.02
"""How often to look whether the lock is free."""


class Held(Exception):
    """Another process or thread holds the lock.

    Attributes:
        holder: what it wrote into the file when it took the lock; "" if it could not.
    """

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder

    def __str__(self) -> str:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            found = json.loads(self.holder)
            return f"process {int(found['pid'])} on {str(found['host'])[:100]!r}"
        return "another process"


@contextlib.contextmanager
def locked(path: Path, wait_s: float, *, beside: str = "") -> Iterator[None]:
    """Hold the lock of a file, which is created and stays.

    Args:
        wait_s: how long to wait for one holder. Where each in turn takes it for a moment, the wait
            is longer.
        beside: `Held.holder` of a holder that is not waited for.

    Raises:
        Held: one holder keeps it for that time.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        end, last = time.monotonic() + wait_s, ""
        while not _taken(descriptor):
            if (holder := _read(descriptor)) != last:
                end, last = time.monotonic() + wait_s, holder
            if time.monotonic() >= end or (holder and holder == beside):
                raise Held(holder)
            time.sleep(LOOK_S)
        described = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time_ns()}
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the description
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(described).encode(), 0)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked process may keep the file open
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno not in UNSUPPORTED:
            raise
    return True


def _read(descriptor: int) -> str:
    try:
        return os.pread(descriptor, 1000, 0).decode("utf-8", "replace")
    except OSError:
        return ""
