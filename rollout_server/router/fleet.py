"""Keeps the replicas of a router alive: started, watched, fenced, started again, brought to the current version."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

from agentloop.errors import ServerStartError
from rollout_server.engines.base import (
    EngineError,
    EngineInfo,
    EngineStats,
    Generation,
    GenerationResult,
    WeightsConfirmation,
    WeightsError,
)
from rollout_server.errors import HttpError
from rollout_server.replica.base import Replica, ReplicaGone
from rollout_server.router.router import Member, Router

log = logging.getLogger(__name__)

LONGEST_BACKOFF_S = 30.0
FIRST_BACKOFF_S = 0.25
WELL_AFTER_S = 30.0
"""A replica that has served for so long starts again without waiting."""


class Source(Protocol):
    """Where a replica comes from: a process to start, or a URL."""

    @property
    def name(self) -> str: ...

    async def start(self) -> Replica:
        """A replica that answers.

        Raises:
            ServerStartError: there is none.
        """
        ...

    async def ended(self) -> str:
        """Wait for its end, if it has one of its own; returns the reason."""
        ...

    async def stop(self, *, gently: bool) -> None:
        """Leave nothing of it behind."""
        ...


class Fleet:
    """One keeper task for each replica of `router`.

    Args:
        router: gets a member for each source.
        probe_every_s: pause between two probes by generation.
        probe_timeout_s: a replica that samples nothing for so long is taken for hung.
        max_starts: a replica that fails to start so often in a row is given up.
    """

    def __init__(
        self,
        router: Router,
        sources: Sequence[Source],
        *,
        probe_every_s: float = 2.0,
        probe_timeout_s: float = 20.0,
        max_starts: int = 5,
    ) -> None:
        self._router = router
        self._sources = list(sources)
        self._probe_every_s = probe_every_s
        self._probe_timeout_s = probe_timeout_s
        self._max_starts = max_starts
        self._keepers: list[asyncio.Task[None]] = []
        for source in sources:
            router.members.append(Member(_NotStarted(source.name, router.info), state="starting"))

    async def start(self) -> None:
        """Start all replicas at once, and keep them from then on.

        Raises:
            ServerStartError: one does not start; all are stopped again.
        """
        members = self._router.members[-len(self._sources) :]
        starting = [asyncio.create_task(source.start()) for source in self._sources]
        try:
            for member, replica in zip(members, await asyncio.gather(*starting), strict=True):
                member.replica = replica
            sources = self._sources
            await asyncio.gather(*(self._admit(m, source) for m, source in zip(members, sources, strict=True)))
        except BaseException:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            await asyncio.gather(*(source.stop(gently=False) for source in self._sources))
            raise
        for member, source in zip(members, self._sources, strict=True):
            keeper = self._keep(member, source, running=True)
            self._keepers.append(asyncio.create_task(keeper, name=f"keeper of {source.name}"))

    async def close(self) -> None:
        """Stop all of them."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(source.stop(gently=True) for source in self._sources))

    async def _keep(self, member: Member, source: Source, *, running: bool) -> None:
        failures = 0
        backoff = FIRST_BACKOFF_S
        loop = asyncio.get_running_loop()
        while True:
            try:
                if not running:
                    member.replica = await source.start()
                    await self._admit(member, source)
                    log.info("replica %s serves version %s again", source.name, self._router.weight_version)
                running, failures, since = False, 0, loop.time()
                reason = await self._watch(member, source)
                if loop.time() - since > WELL_AFTER_S:
                    backoff = FIRST_BACKOFF_S
                await self._router.fence(member, reason)
            except Exception as exc:
                if not isinstance(exc, ServerStartError | EngineError | WeightsError | HttpError):
                    log.exception("the keeper of %s stumbled", source.name)
                failures += 1
                log.error("replica %s did not start: %s", source.name, exc)
                await self._router.fence(member, str(exc), "failed" if failures >= self._max_starts else "fenced")
            await source.stop(gently=False)
            if member.state == "failed":
                log.error("replica %s is given up after %d starts that failed", source.name, failures)
                return
            member.state = "starting"
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LONGEST_BACKOFF_S)

    async def _admit(self, member: Member, source: Source) -> None:
        """Let it serve once it has the current version. One that dies or hangs on the way holds nobody up.

        Raises:
            EngineError: it did.
            WeightsError: it cannot serve that version.
        """
        coming = asyncio.create_task(self._bring_to_version(member))
        trouble = asyncio.create_task(self._first_of(source.ended(), self._stay_alive(member)))
        try:
            await asyncio.wait([coming, trouble], return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                raise EngineError(f"on the way to version {self._router.weight_version}: {trouble.result()}")
            coming.result()
        finally:
            await _cancel(coming, trouble)

    async def _bring_to_version(self, member: Member) -> None:
        """Load the current weights, paused as the others are, and let it serve.

        The long part runs beside other updates; the last look and the admission do not, so that no version slips by.
        """
        router, replica = self._router, member.replica
        while True:
            source, version = router.source, router.weight_version
            if source is not None and replica.weight_version != version:
                receipt = await replica.update_weights(source, version)
                if version == router.weight_version:
                    router.check_receipt(receipt)
            async with router.changing:
                if router.source is None or replica.weight_version == router.weight_version:
                    paused = None
                    while paused != router.paused:
                        paused = router.paused
                        await (replica.resume() if paused is None else replica.pause(paused))
                    await router.admit(member)
                    return

    async def _watch(self, member: Member, source: Source) -> str:
        """Wait until it is dead, hung or fenced; returns why."""
        return await self._first_of(
            source.ended(), self._stay_alive(member), self._go_on_sampling(member), _fenced(member)
        )

    @staticmethod
    async def _first_of(*watches: Coroutine[Any, Any, str]) -> str:
        tasks = [asyncio.create_task(watch) for watch in watches]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            await _cancel(*tasks)

    async def _stay_alive(self, member: Member) -> str:
        """Wait until it answers nothing."""
        while True:
            failure = await self._try(member.replica.alive())
            if failure is not None:
                return f"it answers nothing: {failure}"
            await asyncio.sleep(self._probe_every_s)

    async def _go_on_sampling(self, member: Member) -> str:
        """Wait until it samples nothing. A pause or an update holds sampling up, and says nothing about it."""
        while True:
            await asyncio.sleep(self._probe_every_s)
            if self._held:
                continue
            failure = await self._try(member.replica.probe())
            if failure is not None and not self._held:
                return f"it samples nothing: {failure}"

    async def _try(self, probe: Coroutine[Any, Any, None]) -> str | None:
        """What went wrong with a probe, or None."""
        try:
            async with asyncio.timeout(self._probe_timeout_s):
                await probe
        except (EngineError, HttpError, TimeoutError) as exc:
            return str(exc) or f"not in {self._probe_timeout_s:g} s"
        return None

    @property
    def _held(self) -> bool:
        return self._router.paused is not None or self._router.changing.locked()


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _fenced(member: Member) -> str:
    await member.left.wait()
    return member.reason


class _NotStarted:
    """What stands for a replica before its first start."""

    failure = None
    weight_version = ""
    stream_tokens = 0
    ranks = 1

    def __init__(self, name: str, info: EngineInfo) -> None:
        self.name = name
        self.info = info

    async def generate(self, generation: Generation) -> GenerationResult:
        raise ReplicaGone(f"{self.name} is not started")

    async def abort(self, rid: str | None) -> int:
        return 0

    async def pause(self, mode: object) -> None: ...

    async def resume(self) -> None: ...

    async def flush_cache(self) -> None: ...

    async def update_weights(self, source: object, version: str, running: object = None) -> WeightsConfirmation:
        raise ReplicaGone(f"{self.name} is not started")

    async def join_weights_group(self, group: object) -> None: ...

    async def leave_weights_group(self, name: str) -> bool:
        return False

    async def memory(self, what: object, tags: object) -> None: ...

    async def probe(self) -> None: ...

    async def alive(self) -> None: ...

    async def refresh(self) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats()

    async def close(self) -> None: ...
