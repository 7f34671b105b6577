"""Time limits that do not count how long something waits for infrastructure.

`tool_timeout_s` and `episode_timeout_s` limit what a model causes. A call that waits for a free
worker, or for a server that is being restarted, would use them up, and the model would be told, or
the episode scored, as if it had been slow itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from types import TracebackType


class TimeLimit:
    """`asyncio.timeout` whose clock stands still while something in it waits in `not_counted`.

    Limits nest, and the clocks of the outer ones stand still too. Tasks that are started within one
    belong to it.

    Args:
        seconds: None: no limit.

    Raises:
        TimeoutError: at the end of the block, as `asyncio.timeout` does.
    """

    def __init__(self, seconds: float | None) -> None:
        self._timeout = asyncio.timeout(seconds)
        self._outer: TimeLimit | None = None
        self._waits = 0
        self._left: float | None = None  # seconds, while the clock stands still
        self._counted = 0.0
        self._open = False

    async def __aenter__(self) -> TimeLimit:
        await self._timeout.__aenter__()
        self._outer = _innermost.get()
        _innermost.set(self)
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        _innermost.set(self._outer)
        await self._timeout.__aexit__(kind, error, trace)

    def expired(self) -> bool:
        """Whether the time has run out."""
        return self._timeout.expired()

    def _stand_still(self) -> None:
        self._waits += 1
        when = self._timeout.when()
        if self._waits > 1 or when is None or not self._open or self.expired():
            return
        self._left, self._counted = when - asyncio.get_running_loop().time(), 0.0
        self._timeout.reschedule(None)

    def _go_on(self, counted: float) -> None:
        self._waits -= 1
        # What waits at the same time counts once, with the longest.
        self._counted = max(self._counted, counted)
        if self._waits or self._left is None or not self._open:
            return
        left, self._left = self._left - self._counted, None
        self._timeout.reschedule(asyncio.get_running_loop().time() + left)


class Wait:
    """A wait that is not counted; `count` gives back the part that is."""

    def __init__(self) -> None:
        self.counted = 0.0

    def count(self, seconds: float) -> None:
        """Count `seconds` of the wait after all: the work itself was done in them."""
        self.counted += seconds


_innermost: ContextVar[TimeLimit | None] = ContextVar("agentloop_time_limit", default=None)


@contextmanager
def not_counted() -> Iterator[Wait]:
    """Stop the clocks of the time limits around this block; without one, do nothing."""
    limits = []
    limit = _innermost.get()
    while limit is not None:
        limits.append(limit)
        limit = limit._outer
    for each in limits:
        each._stand_still()
    wait = Wait()
    try:
        yield wait
    finally:
        for each in limits:
            each._go_on(wait.counted)


@asynccontextmanager
async def place_in(semaphore: asyncio.Semaphore) -> AsyncIterator[None]:
    """Hold a place of a semaphore; the wait for it is not counted."""
    with not_counted():
        await semaphore.acquire()
    try:
        yield
    finally:
        semaphore.release()
