"""Schedule episodes in slices, so that a burst blocks the event loop for one slice at most."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

SLICE_S = 0.01


class Pacer:
    """Runs episodes until a slice is used up, then lets the event loop poll timers and sockets.

    An event loop runs all ready callbacks before it polls again. Thousands of episodes that start
    together, or are answered together, are ready together: at half a millisecond each, no timeout
    fires and no answer is read for seconds. Episodes that do not fit into a slice wait in order of
    arrival.

    Args:
        slice_s: seconds of work between two polls, approximately.
        clock: returns the time in seconds.
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
        """Wait for a turn; return immediately while the current slice has room."""
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
        """Start the next slice. Runs once per pass of the event loop, after it polled."""
        # 1. Measure before waking others: the time since `_began` is the work of the last batch
        #    alone. The next batch is what fits into a slice, but at most twice the last one.
        now = self._clock()
        if self._released:
            fits = self._slice_s * self._released / max(now - self._began, 1e-9)
            self._batch = max(1.0, min(0.5 * self._batch + 0.5 * fits, 2.0 * self._batch))

        # 2. Wake the next batch. `set_result` only puts the episodes into the loop's ready queue.
        self._began, self._released = now, 0
        while self._waiting and self._released < self._batch:
            future = self._waiting.popleft()
            if not future.done():  # cancelled meanwhile
                future.set_result(None)
                self._released += 1

        if not self._released:
            self._active = False
            return

        # 3. Schedule the next slice last: it is queued after the episodes just woken.
        assert self._loop is not None
        self._loop.call_soon(self._look)
