"""`RateLimit`: how many requests a second a tool sends, and how many are in flight.

A limit with a name is that of the whole run: in an agent worker, the main process counts for all of
them (`share`).
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from typing import Protocol

from agentloop.client.time_limit import not_counted

NOW_S = 1e-9
"""A shorter wait is none: rounding leaves some that no clock can tell from now."""

BURST_S = 0.1
"""A bucket holds the tokens of this many seconds: what a late timer misses is made up for."""


class SharedLimits(Protocol):
    """The limits of a run whose episodes run in several processes."""

    def slot(
        self, name: str, rate: float | None, concurrent: int, caller: Hashable
    ) -> AbstractAsyncContextManager[None]:
        """Wait for a turn of a limit; the block is one request. The wait is not counted by time
        limits around it."""
        ...


_shared: ContextVar[SharedLimits | None] = ContextVar("agentloop_shared_limits", default=None)


def share(limits: SharedLimits) -> None:
    """Let `limits` count for every limit with a name, in this context and the tasks made in it."""
    _shared.set(limits)


class RateLimit:
    """A token bucket and a bound of requests in flight; episodes are served in turns.

    A bucket alone lets its size and its rate through in the same second. Here no second, wherever
    it begins, has more than `rate` starts: the last `rate` of them are remembered.

    Those who wait are served round robin, one request of each episode at a time, so that an
    episode with a thousand requests delays another by one request only.

    Args:
        rate: starts a second; below 1, one in `1 / rate` seconds. None: no limit.
        concurrent: requests in flight.
        clock: seconds; None: the event loop's. For tests.
        name: equal in all processes of a run; empty: a limit of this process.
    """

    def __init__(
        self, rate: float | None, concurrent: int, clock: Callable[[], float] | None = None, *, name: str = ""
    ) -> None:
        self._name = name
        self._rate = rate
        self._concurrent = concurrent
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reset()

    def _reset(self) -> None:
        rate = self._rate or math.inf
        per_window = max(1, math.floor(rate)) if self._rate else 0
        self._window_s = per_window / rate  # 1 s for a whole number
        self._recent: deque[float] = deque(maxlen=per_window)
        self._most = max(1.0, BURST_S * rate)
        self._tokens, self._filled = self._most, -math.inf
        self._running = 0
        self._waiting: dict[Hashable, deque[asyncio.Future[None]]] = {}  # in the order of their turns
        self._timer: asyncio.TimerHandle | None = None

    @property
    def in_flight(self) -> int:
        return self._running

    @asynccontextmanager
    async def slot(self, caller: Hashable) -> AsyncIterator[None]:
        """Wait for a turn; the block is one request of `caller`, an episode."""
        shared = _shared.get()
        if self._name and shared is not None:
            async with shared.slot(self._name, self._rate, self._concurrent, caller):
                yield
            return

        await self._acquire(caller)
        try:
            yield
        finally:
            self._release()

    async def _acquire(self, caller: Hashable) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # a tool outlives the event loop of a test or an evaluation
            self._loop = loop
            self._reset()

        if not self._waiting and self._running < self._concurrent and self._delay(self._now()) <= NOW_S:
            self._take(self._now())
            return

        future: asyncio.Future[None] = loop.create_future()
        self._waiting.setdefault(caller, deque()).append(future)
        self._serve()
        try:
            with not_counted():
                await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # its turn came, and nobody takes it
                self._release()
            raise

    def _release(self) -> None:
        self._running -= 1
        self._serve()

    def _serve(self) -> None:
        """Start those whose turn it is; set a timer for the next."""
        while self._waiting and self._running < self._concurrent:
            now = self._now()
            delay = self._delay(now)
            if delay > NOW_S:
                self._wake_in(delay)
                return

            # 1. The first caller's oldest request that was not cancelled.
            caller = next(iter(self._waiting))
            queue = self._waiting.pop(caller)
            while queue and queue[0].done():
                queue.popleft()
            if not queue:
                continue

            # 2. The caller's next turn comes after those of all others.
            future = queue.popleft()
            if queue:
                self._waiting[caller] = queue
            self._take(now)
            future.set_result(None)

    def _wake_in(self, delay: float) -> None:
        if self._timer is None:
            assert self._loop is not None
            self._timer = self._loop.call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._serve()

    def _now(self) -> float:
        assert self._loop is not None
        return self._clock() if self._clock is not None else self._loop.time()

    def _delay(self, now: float) -> float:
        """Return the seconds until a request may start; `NOW_S` or less: now."""
        if not self._rate:
            return 0.0
        self._tokens = min(self._most, self._tokens + max(0.0, now - self._filled) * self._rate)
        self._filled = now
        delay = (1.0 - self._tokens) / self._rate
        if len(self._recent) == self._recent.maxlen:
            delay = max(delay, self._recent[0] + self._window_s - now)
        return delay

    def _take(self, now: float) -> None:
        self._running += 1
        if self._rate:
            self._tokens -= 1.0
            self._recent.append(now)
