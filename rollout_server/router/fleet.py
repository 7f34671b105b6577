"""Start, probe, fence and restart the replicas of a router, at the current version."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from agentloop.errors import ServerStartError
from agentloop.runtime.child import ChildKilled
from rollout_server.errors import Conflict, EngineError, RequestError, WeightsError
from rollout_server.replica.base import Replica
from rollout_server.replica.starting.base import Source
from rollout_server.router.members import Member
from rollout_server.router.router import Router

log = logging.getLogger(__name__)

LONGEST_BACKOFF_S = 30.0
FIRST_BACKOFF_S = 0.25
WELL_AFTER_S = 30.0
"""A replica that has served this long is restarted without growing pauses."""


@dataclass(eq=False)
class _Place:
    """A replica's place, and the task that keeps a replica in it."""

    number: int
    member: Member
    source: Source
    supervisor: asyncio.Task[None] | None = None


class Fleet:
    """One supervisor task for each replica of `router`.

    Args:
        router: gets a member for each source.
        make_source: makes the source of replica `number`, for `scale`; None: the replicas are those
            that there are.
        probe_every_s: pause between two probes.
        probe_timeout_s: a replica that samples nothing for this long counts as hung.
        max_starts: after this many failed starts in a row, a replica is not started again. Starts
            that a signal ended count only until all have served once.
    """

    def __init__(
        self,
        router: Router,
        sources: Sequence[Source],
        *,
        probe_every_s: float = 2.0,
        probe_timeout_s: float = 20.0,
        max_starts: int = 5,
        make_source: Callable[[int], Source] | None = None,
    ) -> None:
        self._router = router
        self._make_source = make_source
        self._members = router.members
        self._probe_every_s = probe_every_s
        self._probe_timeout_s = probe_timeout_s
        self._max_starts = max_starts
        self._places = [
            _Place(number, router.members.add(source.name), source) for number, source in enumerate(sources)
        ]
        self._scaling = asyncio.Lock()

    async def start(self) -> None:
        """Start all replicas at once, and supervise them from then on.

        Raises:
            ServerStartError: a replica did not start; all are stopped again.
        """
        starting = [asyncio.create_task(self._start(place.member, place.source)) for place in self._places]
        try:
            await asyncio.gather(*starting)
        except BaseException:
            await _cancel(*starting)
            await asyncio.gather(*(place.source.stop(gently=False) for place in self._places))
            raise

        for place in self._places:
            self._keep(place, running=True)

    def _keep(self, place: _Place, *, running: bool) -> None:
        """Supervise a replica from now on; `running`: it serves already."""
        work = self._supervise(place.member, place.source, running=running)
        place.supervisor = asyncio.create_task(work, name=f"supervisor of {place.source.name}")

    async def scale(self, replicas: int) -> None:
        """Have this many replicas from now on.

        New ones start beside the others, load the current version, and then take requests; one that
        does not start is tried again, as any replica that died. Those that leave are the newest:
        their requests go to the others with the tokens that they have.

        Args:
            replicas: at least 1.

        Raises:
            Conflict: the replicas are given by their URLs.
        """
        if self._make_source is None:
            raise Conflict("the replicas of this server are given by their URLs", "replicas")
        async with self._scaling:
            taken = {place.number for place in self._places}
            unused = (number for number in itertools.count() if number not in taken)
            for number in itertools.islice(unused, max(0, replicas - len(self._places))):
                source = self._make_source(number)
                place = _Place(number, self._members.add(source.name), source)
                self._places.append(place)
                self._keep(place, running=False)

            # First those that failed for good, then those that do not serve, then the newest.
            self._places.sort(key=lambda place: (place.member.state == "failed", not place.member.serves, place.number))
            leaving = self._places[replicas:]
            del self._places[replicas:]
            await asyncio.gather(*(self._end(place) for place in leaving))

    async def _end(self, place: _Place) -> None:
        # An update waits for all that serve. Until it is over, the supervisor fences a replica that
        # hangs.
        async with self._router.weights.changing:
            if place.supervisor is not None:
                await _cancel(place.supervisor)
            await self._members.remove(place.member)
        await place.source.stop(gently=True)

    async def _start(self, member: Member, source: Source) -> None:
        """Start a replica and admit it; again, with growing pauses, if it is killed or hangs.

        Raises:
            ServerStartError: it ended by itself, or `max_starts` starts failed.
        """
        backoff = FIRST_BACKOFF_S
        for left in reversed(range(self._max_starts)):
            try:
                member.replica = await source.start()
                await self._admit(member, source)
                return
            except (ChildKilled, EngineError) as exc:
                if not left:
                    raise ServerStartError(f"replica {source.name} did not start: {exc}", "see its log") from exc
                log.error("replica %s is started again: %s", source.name, exc)
                await self._members.fence(member, str(exc))
                await source.stop(gently=False)
                member.state = "starting"
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, LONGEST_BACKOFF_S)

    async def close(self) -> None:
        """Stop all replicas."""
        await _cancel(*(place.supervisor for place in self._places if place.supervisor is not None))
        await asyncio.gather(*(place.source.stop(gently=True) for place in self._places))

    async def _supervise(self, member: Member, source: Source, *, running: bool) -> None:
        """Watch a replica; start it, with growing pauses, whenever it does not serve."""
        failures, backoff = 0, FIRST_BACKOFF_S
        loop = asyncio.get_running_loop()
        while True:
            try:
                if not running:
                    member.replica = await source.start()
                    await self._admit(member, source)
                    log.info("replica %s serves again, at version %s", source.name, self._router.weights.version)

                running, failures, since = False, 0, loop.time()
                reason = await self._watch(member, source)
                if loop.time() - since > WELL_AFTER_S:
                    backoff = FIRST_BACKOFF_S
                await self._members.fence(member, reason)
            except Exception as exc:
                if not isinstance(exc, ServerStartError | EngineError | WeightsError | RequestError):
                    log.exception("supervisor of replica %s failed unexpectedly", source.name)
                # What kills it may be over with the next start, as when the kernel needed memory.
                failures += not isinstance(exc, ChildKilled)
                log.error("replica %s did not start: %s", source.name, exc)
                await self._members.fence(member, str(exc), "failed" if failures >= self._max_starts else "fenced")

            await source.stop(gently=False)
            if member.state == "failed":
                log.error("replica %s failed to start %d times and will not be started again", source.name, failures)
                return

            member.state = "starting"
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LONGEST_BACKOFF_S)

    async def _admit(self, member: Member, source: Source) -> None:
        """Admit a replica once it has loaded the current version. Stop waiting if it dies or hangs.

        Raises:
            EngineError: it died or hung.
            WeightsError: it cannot serve that version.
        """
        loading = asyncio.create_task(self._bring_to_version(member))
        trouble = asyncio.create_task(self._first_of(source.ended(), self._stays_alive(member)))
        try:
            await asyncio.wait([loading, trouble], return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                raise EngineError(f"while loading version {self._router.weights.version}: {trouble.result()}")
            loading.result()
        finally:
            await _cancel(loading, trouble)

    async def _bring_to_version(self, member: Member) -> None:
        """Load the current weights into a started replica, pause it like the others, admit it."""
        weights, replica = self._router.weights, member.started
        loaded: int | None = None  # the update that this replica has loaded
        while True:
            # Loading takes long and runs beside other updates, which may make this version an old
            # one. Names do not tell: an update may keep the name.
            source, version, count = weights.source, weights.version, weights.count
            if source is not None and loaded != count:
                confirmation = await replica.update_weights(source, version)
                loaded = count
                if count == weights.count:
                    weights.check_confirmation(confirmation)

            # The last comparison and the admission exclude updates, so that the replica cannot miss
            # one in between.
            async with weights.changing:
                if weights.source is None or loaded == weights.count:
                    if replica.weight_version != weights.version:
                        await replica.rename_weights(weights.version)
                    await self._follow(replica)
                    await self._members.admit(member)
                    return

    async def _follow(self, replica: Replica) -> None:
        """Pause a replica and release its memory, if the others have."""
        router = self._router
        paused, released = None, False
        while paused != router.paused or (router.released and not released):
            if paused != router.paused:  # a pause may begin or end while the replica follows it
                paused = router.paused
                await (replica.resume() if paused is None else replica.pause(paused))
            else:  # memory stays as it is meanwhile: `Router.memory` waits for the lock
                await replica.memory("release", sorted(router.released))
                released = True

    async def _watch(self, member: Member, source: Source) -> str:
        """Wait until the replica is dead, hung or fenced; return the reason."""
        return await self._first_of(
            source.ended(), self._stays_alive(member), self._keeps_sampling(member), _fenced(member)
        )

    @staticmethod
    async def _first_of(*watches: Coroutine[Any, Any, str]) -> str:
        tasks = [asyncio.create_task(watch) for watch in watches]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            await _cancel(*tasks)

    async def _stays_alive(self, member: Member) -> str:
        """Wait until it no longer answers; return the reason."""
        while True:
            failure = await self._try(member.started.alive())
            if failure is not None:
                return f"it does not answer: {failure}"
            await asyncio.sleep(self._probe_every_s)

    async def _keeps_sampling(self, member: Member) -> str:
        """Wait until it no longer samples, apart from pauses and updates; return the reason."""
        while True:
            await asyncio.sleep(self._probe_every_s)
            if self._paused:
                continue
            failure = await self._try(member.started.probe())
            if failure is not None and not self._paused:
                return f"it samples nothing: {failure}"

    async def _try(self, probe: Coroutine[Any, Any, None]) -> str | None:
        """Return why a probe failed, or None."""
        try:
            async with asyncio.timeout(self._probe_timeout_s):
                await probe
        except (EngineError, RequestError, TimeoutError) as exc:
            return str(exc) or f"timed out after {self._probe_timeout_s:g} s"
        return None

    @property
    def _paused(self) -> bool:
        """Whether sampling may stop without a fault."""
        router = self._router
        return router.paused is not None or bool(router.released) or router.weights.changing.locked()


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _fenced(member: Member) -> str:
    await member.left.wait()
    return member.reason
