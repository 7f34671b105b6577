"""`Pool`: sandboxes that are ready before a program comes. Each runs one, and is then ended.

The way of a program: wait for one of `max_running` places, in order of arrival; take a waiting
sandbox, or start one; run; end the sandbox. Meanwhile others are started in the background.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from agentloop.errors import ToolError
from tools.sandbox.isolation.bubblewrap import Bubblewrap
from tools.sandbox.isolation.cgroup import Cgroups
from tools.sandbox.settings import SandboxSettings
from tools.sandbox.worker import Worker

log = logging.getLogger(__name__)

ATTEMPTS = 3
AGAIN_S = 1.0
"""After this pause, a sandbox is started in the place of one that could not be."""

STARTS_AT_ONCE = max(8, 2 * (os.cpu_count() or 1))
"""More than the cores: a start spends most of its time waiting for the kernel's namespaces. On two
cores, 8 give 1.8 times the programs a second of 2."""


class QueueFull(Exception):
    """As many programs wait as may."""


class Pool:
    """The sandboxes of a server. `close` ends all of them."""

    def __init__(self, settings: SandboxSettings, launcher: Bubblewrap, cgroups: Cgroups | None) -> None:
        self._settings = settings
        self._launcher = launcher
        self._cgroups = cgroups
        self._places = asyncio.Semaphore(settings.max_running)
        self._starts = asyncio.Semaphore(STARTS_AT_ONCE)
        self._idle: deque[Worker] = deque()
        self._slots: deque[int] = deque()
        self._next_slot = 0
        self._filling: set[asyncio.Task[None]] = set()
        self._starting = 0  # not `len(_filling)`: a task is in there for a moment after its end
        self._ending: set[asyncio.Task[None]] = set()
        self._live: set[Worker] = set()
        self._closed = False
        self.running = 0
        self.queued = 0

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def live(self) -> int:
        """Sandboxes that exist, whatever they do."""
        return len(self._live)

    def fill(self) -> None:
        """Start sandboxes in the background until `warm` of them wait."""
        while not self._closed and len(self._idle) + self._starting < self._settings.warm:
            self._starting += 1
            task = asyncio.create_task(self._fill(), name="start a sandbox")
            self._filling.add(task)
            task.add_done_callback(self._filling.discard)

    async def filled(self) -> None:
        """Wait until the sandboxes that are being started wait for programs."""
        while self._filling:
            await asyncio.gather(*self._filling, return_exceptions=True)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for the right to run something.

        Raises:
            QueueFull: as many wait as may.
        """
        await self.acquire(self._places)
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._places.release()

    async def acquire(self, lock: asyncio.Lock | asyncio.Semaphore) -> None:
        """Acquire a lock, and count among those that wait meanwhile.

        Raises:
            QueueFull: as many wait as may.
        """
        if lock.locked() and self.queued >= self._settings.max_queue:
            raise QueueFull
        self.queued += 1
        try:
            await lock.acquire()
        finally:
            self.queued -= 1

    async def begin(self, job: Callable[[Worker], dict[str, Any]], memory: int) -> Worker:
        """Give a job to a sandbox, which the caller ends with `end`; another one if it has died.

        Args:
            job: returns the job for a sandbox.
            memory: bytes that its processes may take together.

        Raises:
            ToolError: none could be started, or `ATTEMPTS` of them ended before they began.
        """
        for attempt in range(1, ATTEMPTS + 1):
            worker = await self.take()
            try:
                await worker.begin(job(worker), memory)
                return worker
            except BaseException as exc:
                await self.end(worker)
                if not isinstance(exc, ToolError) or attempt == ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    async def take(self) -> Worker:
        """Return a sandbox that waits for a job; the caller ends it with `end`.

        Raises:
            ToolError: none could be started.
        """
        while self._idle:
            worker = self._idle.popleft()
            if worker.alive:
                break
            await self.end(worker)
        else:
            worker = await self._start()
        self.fill()
        return worker

    async def end(self, worker: Worker) -> None:
        """End a sandbox and wait until nothing of it is left."""
        # Also if who waits is cancelled: a client that goes away leaves nothing running.
        ending = asyncio.create_task(self._end(worker), name="end a sandbox")
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        await asyncio.shield(ending)

    async def close(self) -> None:
        self._closed = True
        for task in list(self._filling):
            task.cancel()
        await asyncio.gather(*self._filling, return_exceptions=True)
        self._idle.clear()
        await asyncio.gather(*(self._end(worker) for worker in list(self._live)), return_exceptions=True)
        await asyncio.gather(*self._ending, return_exceptions=True)

    async def _fill(self) -> None:
        try:
            worker = await self._start()
        except ToolError as exc:
            self._starting -= 1
            log.warning("%s", exc.message)
            asyncio.get_running_loop().call_later(AGAIN_S, self.fill)
            return
        self._starting -= 1
        if self._closed:
            await self._end(worker)
        else:
            self._idle.append(worker)

    async def _start(self) -> Worker:
        async with self._starts:
            slot = self._slots.popleft() if self._slots else self._next_slot
            self._next_slot = max(self._next_slot, slot + 1)
            worker = Worker(self._launcher, self._cgroups, slot)
            self._live.add(worker)
            try:
                await worker.start()
            except BaseException:
                await self.end(worker)
                raise
            return worker

    async def _end(self, worker: Worker) -> None:
        if worker not in self._live:
            return
        self._live.remove(worker)
        try:
            await worker.end()
        except ToolError as exc:
            log.error("%s", exc)
        else:
            self._slots.append(worker.slot)
