"""`RunLimits`: the rate limits of tools, counted in the main process for all agent workers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable

from agentloop.client.rate_limit import RateLimit
from agentloop.worker.messages import Acquire


class RunLimits:
    """Grants the turns that workers ask for.

    A tool's limit is that of the run, as if all episodes ran in one process: its rate is true over
    all workers, and its turns go round all episodes.
    """

    def __init__(self) -> None:
        self._limits: dict[str, RateLimit] = {}
        self._turns: dict[tuple[Hashable, int], asyncio.Task[None]] = {}

    def acquire(self, worker: Hashable, message: Acquire, grant: Callable[[], None]) -> None:
        """Call `grant` when a worker's request has its turn, which lasts until `release`."""
        limit = self._limits.get(message.name)
        if limit is None:
            limit = self._limits[message.name] = RateLimit(message.rate, message.concurrent)
        key = worker, message.id
        turn = asyncio.create_task(_hold(limit, (worker, message.caller), grant), name=f"a turn of {message.name}")
        self._turns[key] = turn
        turn.add_done_callback(lambda _: self._turns.pop(key, None))

    def release(self, worker: Hashable, number: int) -> None:
        """End a turn, or stop waiting for it."""
        if (turn := self._turns.get((worker, number))) is not None:
            turn.cancel()

    def drop(self, worker: Hashable) -> None:
        """End all turns of a worker, which has died."""
        for (owner, _), turn in list(self._turns.items()):
            if owner == worker:
                turn.cancel()


async def _hold(limit: RateLimit, caller: Hashable, grant: Callable[[], None]) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        async with limit.slot(caller):
            grant()
            await asyncio.get_running_loop().create_future()  # until it is cancelled
