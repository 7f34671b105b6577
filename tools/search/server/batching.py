"""`Batcher`: the queries that wait while the index works become its next batch."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tools.search.index.base import Hits, Index


class Overloaded(Exception):
    """Too many queries wait."""


class Batcher:
    """Hands queries to an index in threads, several at a time.

    A lone query is never held back to wait for others: batches form by themselves while earlier
    ones run, and are the larger the more there is to do.

    Args:
        threads: batches at once. 1 for an index that uses several cores itself.
        largest: queries in one batch.
        most_waiting: further queries are refused.
        on_batch: called with the size of each batch.
    """

    def __init__(
        self,
        index: Index,
        *,
        threads: int = 1,
        largest: int = 64,
        most_waiting: int = 65_536,
        on_batch: Callable[[int], None] = lambda _size: None,
    ) -> None:
        self._index = index
        self._threads, self._largest, self._most_waiting = threads, largest, most_waiting
        self._on_batch = on_batch
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="search")
        self._waiting: deque[tuple[str, int, asyncio.Future[Hits]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = 0  # tasks that look at what waits once more; one in `_tasks` may have just ended

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, query: str, k: int) -> asyncio.Future[Hits]:
        """Return the future hits of a query.

        Raises:
            Overloaded: too many wait.
        """
        if len(self._waiting) >= self._most_waiting:
            raise Overloaded
        future: asyncio.Future[Hits] = asyncio.get_running_loop().create_future()
        self._waiting.append((query, k, future))
        if self._running < self._threads:
            self._running += 1
            task = asyncio.create_task(self._run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return future

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        """Search until nothing waits."""
        try:
            while self._waiting:
                await self._search_batch()
        finally:
            self._running -= 1

    async def _search_batch(self) -> None:
        loop = asyncio.get_running_loop()
        # An equal share for each thread; callers that left are not served.
        size = min(self._largest, math.ceil(len(self._waiting) / self._threads))
        batch = [self._waiting.popleft() for _ in range(size)]
        batch = [entry for entry in batch if not entry[2].done()]
        if not batch:
            return
        self._on_batch(len(batch))
        queries, most = [query for query, _, _ in batch], max(k for _, k, _ in batch)
        try:
            found = await loop.run_in_executor(self._pool, self._index.search, queries, most)
        except Exception as exc:  # noqa: BLE001  # each request reports it
            for _, _, future in batch:
                if not future.done():
                    future.set_exception(exc)
            return
        for (_, k, future), hits in zip(batch, found, strict=True):
            if not future.done():
                future.set_result(Hits(hits.numbers[:k], hits.scores[:k]))
