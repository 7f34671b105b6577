"""`Output`: what a program writes to a pipe, up to a limit."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

CHUNK = 2**16


class Output:
    """Collects one stream without blocking the event loop.

    Args:
        fd: read end of the pipe; it is closed by `close`.
        limit: bytes that are kept.
        on_excess: called once when more was written.
    """

    def __init__(self, fd: int, limit: int, on_excess: Callable[[], None]) -> None:
        self._fd = fd
        self._limit = limit
        self._on_excess = on_excess
        self._kept = bytearray()
        self._full = False
        self._loop = asyncio.get_running_loop()
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._read)

    def take(self) -> str:
        """Return what was written since the last call, including what is still in the pipe.

        What does not decode as UTF-8 is replaced.
        """
        # A pipe holds 1 MiB at most: a writer that goes on cannot keep this loop busy.
        for _ in range(17):
            if not self._read():
                break
        text = self._kept.decode("utf-8", "replace")
        self._kept.clear()
        self._full = False
        return text

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> bool:
        if self._fd < 0:
            return False
        try:
            part = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return False
        if not part:
            self._loop.remove_reader(self._fd)  # every writer has closed it
            return False
        room = self._limit - len(self._kept)
        self._kept += part[: max(0, room)]
        if len(part) > room and not self._full:
            self._full = True
            self._on_excess()
        return True
