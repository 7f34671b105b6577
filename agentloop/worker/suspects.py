"""`Suspects`: the episodes that may be what ends the workers that run them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from agentloop.worker.handle import Job, WorkerHandle, failed_episode

MOST_DEATHS = 2
"""Workers that may die while an episode runs in them; then it is a suspect."""

MOST_DEATHS_ALONE = 2
"""Workers that may die while it runs in them without others; then it fails."""


class Suspects:
    """Runs suspects in a worker of their own.

    If that dies, they are divided, until the one that ends its worker is alone: of thousands it is
    found in a dozen starts, and the others go on.

    Args:
        worker: runs nothing else.
        start: starts it, so that it takes episodes.
        warn: called with each warning.
    """

    def __init__(
        self, worker: WorkerHandle, start: Callable[[WorkerHandle], Awaitable[None]], warn: Callable[[str], None]
    ) -> None:
        self.worker = worker
        self._start = start
        self._warn = warn
        self._batches: deque[list[Job]] = deque()
        self._arrived = asyncio.Event()

    def add(self, jobs: list[Job]) -> None:
        """Add episodes that `MOST_DEATHS` workers have died with."""
        if jobs:
            self._batches.append(jobs)
            self._arrived.set()

    def take(self) -> list[Job]:
        """Take away and return what waits."""
        jobs = [job for batch in self._batches for job in batch]
        self._batches.clear()
        return jobs

    async def run(self) -> None:
        """Run what is added, until it is cancelled.

        Raises:
            AgentloopError: the worker cannot be started.
        """
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._batches:
                if _unfinished(self._batches[0]):
                    await self._run_first()
                else:
                    self._batches.popleft()
            await self.worker.end()

    async def _run_first(self) -> None:
        """Run the first batch; divide it if the worker dies."""
        worker = self.worker
        if not worker.serving:
            await self._start(worker)
        batch = _unfinished(self._batches.popleft())
        for job in batch:
            worker.give(job)
        ended = asyncio.ensure_future(worker.ended())
        all_done = asyncio.gather(*(job.done for job in batch), return_exceptions=True)
        waiting: list[asyncio.Future[Any]] = [ended, all_done]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if not ended.done():
            return

        left = worker.drop_jobs()
        if len(left) > 1:
            half = len(left) // 2
            self._batches.extendleft([left[half:], left[:half]])
            return
        for job in left:
            job.deaths += 1
            if job.deaths < MOST_DEATHS + MOST_DEATHS_ALONE:
                self._batches.appendleft(left)
            else:
                self._fail(job, ended.result())

    def _fail(self, job: Job, reason: str) -> None:
        self._warn(f"an episode ({job.place}) ends every agent worker that runs it; the last, without others, {reason}")
        error = f"every agent worker that ran it died; the last, in which it was alone, {reason}"
        job.done.set_result([failed_episode(job, f"WorkerError: {error}")])


def _unfinished(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if not job.done.done()]
