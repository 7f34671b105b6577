"""Locks on folders: one process at a time uses a run directory, or a folder of published weights.

A lock is an `flock` on a file. The kernel frees it when its holder ends, however that happens, and
it holds over the paths, links and containers by which the folder can be reached.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of file systems that have no locks."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as it described itself."""

    pid: int | None
    host: str | None

    @property
    def lives(self) -> bool:
        """Whether the process may live; that of another machine may."""
        if self.pid is None or self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            pass
        return True

    def __str__(self) -> str:
        if self.pid is None:
            return "another process"
        return f"process {self.pid} on {self.host}"


class Locked(Exception):
    """Another process holds the lock."""

    def __init__(self, holder: Holder) -> None:
        super().__init__(str(holder))
        self.holder = holder


class FileLock:
    """A held lock. Made with `take`; released by `release`, or when the process ends.

    Attributes:
        supported: whether the file system has locks. Without them nothing is locked.
    """

    def __init__(self, path: Path, descriptor: int, *, supported: bool) -> None:
        self._path = path
        self._descriptor = descriptor
        self.supported = supported

    @classmethod
    def take(cls, path: Path) -> FileLock:
        """Lock a file, creating it, and write into it which process holds it.

        Raises:
            Locked: another process holds the lock.
            OSError: the file cannot be opened.
        """
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                supported = _lock(descriptor)
                # The former holder may have removed the file since it was opened.
                current = _same_file(descriptor, path)
            except BaseException:
                os.close(descriptor)
                raise
            if current:
                break
            os.close(descriptor)

        described = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the description
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, described, 0)
        return cls(path, descriptor, supported=supported)

    def release(self, *, remove: bool = False) -> None:
        """Free the lock. May be called more than once.

        Args:
            remove: delete the file.
        """
        if self._descriptor < 0:
            return
        if remove:
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of an existing file.

    On a file system without locks: whether the process that the file names may live.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _lock(descriptor) and _read_holder(descriptor).lives
    except Locked:
        return True
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a file; return False if its file system has no locks.

    Raises:
        Locked: another process holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Locked(_read_holder(descriptor)) from None
    except OSError as exc:
        if exc.errno in UNSUPPORTED:
            return False
        raise
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read_holder(descriptor: int) -> Holder:
    try:
        described: Any = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        described = None
    fields = described if isinstance(described, dict) else {}
    pid, host = fields.get("pid"), fields.get("host")
    return Holder(pid if isinstance(pid, int) else None, host if isinstance(host, str) else None)
