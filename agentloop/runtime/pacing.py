"""Taking turns: however many episodes have work at one moment, the event loop is held up for no longer than a slice."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

SLICE_S = 0.01


class Pacer:
    """Lets as many episodes work between two looks of the event loop at timers and sockets as fit into a slice.

    A loop runs all that is ready before it looks again. Thousands of episodes that start together, or are answered
    together, are ready together: half a millisecond each is seconds in which no timeout fires and no other answer is
    read. Those that do not fit wait in the order of their coming.

    Args:
        slice_s: seconds of work between two looks, about.
        clock: tells the time, in seconds.
    """

    def __init__(self, slice_s: float = SLICE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._slice_s = slice_s
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._active = False
        self._began = 0.0
        self._batch = 1.0
        self._released = 0

    async def turn(self) -> None:
        """Wait until there is room for some work; it is there at once when not many work."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._active = loop, False
            self._waiting.clear()
        if not self._active:
            self._active, self._began, self._released = True, self._clock(), 0
            loop.call_soon(self._look)
        elif self._waiting or self._clock() - self._began >= self._slice_s:
            future = loop.create_future()
            self._waiting.append(future)
            await future

    def _look(self) -> None:
        """The loop has looked at timers and sockets: the next ones may work."""
        now = self._clock()
        if self._released:
            fits = self._slice_s * self._released / max(now - self._began, 1e-9)
            self._batch = max(1.0, min(0.5 * self._batch + 0.5 * fits, 2.0 * self._batch))
        self._began, self._released = now, 0
        while self._waiting and self._released < self._batch:
            future = self._waiting.popleft()
            if not future.done():  # cancelled meanwhile
                future.set_result(None)
                self._released += 1
        if not self._released:
            self._active = False
            return
        assert self._loop is not None
        self._loop.call_soon(self._look)  # behind those that were just woken
