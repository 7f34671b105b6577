"""Route requests: a session stays where its prefix is cached, a new one goes to the least loaded
replica."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from rollout_server.engines.base import EngineInfo, Generation, GenerationResult, PauseMode, WeightsSource
from rollout_server.errors import Conflict, EngineError, Overloaded, ReplicaGone
from rollout_server.replica.base import Replica
from rollout_server.router.members import Member, Members
from rollout_server.router.partial_answer import ChunkRelay, PartialAnswer, can_continue
from rollout_server.router.updates import WeightUpdates

MAX_SESSIONS = 100_000
"""Maximum number of remembered sessions (LRU)."""

OVERLOAD_FACTOR = 1.5
OVERLOAD_TOKENS = 2048
"""A session leaves its replica when that has more tokens in flight than OVERLOAD_FACTOR times the
average plus OVERLOAD_TOKENS."""

REFRESH_TIMEOUT_S = 1.0

MAX_ATTEMPTS = 8
"""Maximum replicas that may die while serving one request."""

MEMORY_TAGS = ("weights", "kv_cache")
"""Device memory that replicas can release."""

RouterPause = Literal["retract", "in_place", "abort", "wait"]


class Router:
    """Routes generations, and sends administrative calls to all serving replicas at once.

    All serving replicas serve the same model at the same version. One that cannot follow is fenced:
    it gets no more requests, and those that it had go to the others.

    Attributes:
        members: the replicas, and which of them serve.
        weights: the version that they serve, and its updates.
        info: facts about the engine.
        moved: sessions that left their replica.
        resent: requests sent to another replica because theirs died.
        resent_kept_tokens: sampled tokens that these requests kept.

    Args:
        replicas: those that serve from the start.
        info: facts about the engine; needed when there are no replicas yet.
        version: version of the weights at the start; needed when there are no replicas yet.
        source: where replicas load that version from; None: it is the model's own.
        max_in_flight: limit of unanswered requests, queued ones included; None: no limit.
        start_timeout_s: how long a request waits for a replica when none serves.
    """

    def __init__(
        self,
        replicas: Sequence[Replica] = (),
        *,
        info: EngineInfo | None = None,
        version: str | None = None,
        source: WeightsSource | None = None,
        max_in_flight: int | None = None,
        start_timeout_s: float = 300.0,
    ) -> None:
        assert replicas or (info is not None and version is not None)
        self.members = Members(replicas)
        self.info = info or replicas[0].info
        self.weights = WeightUpdates(self.members, replicas[0].weight_version if version is None else version, source)
        self.moved = 0
        self.resent = 0
        self.resent_kept_tokens = 0

        self._max_in_flight = max_in_flight
        self._start_timeout_s = start_timeout_s
        self._paused: PauseMode | None = None
        self._released: set[str] = set()
        self._draining = False  # `pause_generation {"mode": "wait"}`: new requests wait until generation continues
        self._sessions: OrderedDict[str, Member] = OrderedDict()
        self._calls = 0
        self._in_flight = 0
        self._admitted = 0  # those of them that have had a replica

    @property
    def paused(self) -> PauseMode | None:
        return self._paused

    @property
    def released(self) -> frozenset[str]:
        """Tags of the device memory that the replicas have released."""
        return frozenset(self._released)

    def limit(self, max_in_flight: int | None) -> None:
        """Set the limit of unanswered requests; None: no limit."""
        self._max_in_flight = max_in_flight

    @property
    def in_flight(self) -> int:
        """Requests accepted and not yet answered."""
        return self._in_flight

    @property
    def failure(self) -> str | None:
        """The reason why no request can be answered any more, or None."""
        return self.members.failure

    # Generating

    async def generate(self, generation: Generation, session: str | None = None) -> GenerationResult:
        """Generate on the session's replica, or on another one if that dies.

        Raises:
            Overloaded: too many requests are in flight.
            EngineError: the replica failed the request, or none serves.
            RequestError: the engine found the request wrong.
        """
        if self._max_in_flight is not None and self._in_flight >= self._max_in_flight:
            raise Overloaded(self._in_flight, retry_after_s=1.0)

        self._in_flight += 1
        try:
            first = await self._first_member(session)
            self._admitted += 1
            try:
                return await self._generate(generation, session, first)
            finally:
                self._admitted -= 1
                if self._draining and not self._admitted:
                    await self.members.notify()
        finally:
            self._in_flight -= 1

    async def _first_member(self, session: str | None) -> Member:
        """Return the replica for a new request; while requests end before a pause, it waits."""
        member = None if self._draining else self.pick(session)
        return member or await self._wait_for_member(session, new=True)

    async def _generate(self, generation: Generation, session: str | None, member: Member) -> GenerationResult:
        partial: PartialAnswer | None = None
        relay: ChunkRelay | None = None
        if generation.on_chunk is not None:
            relay = ChunkRelay(generation.on_chunk)
            generation = replace(generation, on_chunk=relay)

        for attempt in range(MAX_ATTEMPTS):
            if attempt:  # it was admitted before a pause, which waits for it
                member = self.pick(session) or await self._wait_for_member(session, new=False)

            stream_tokens = member.started.stream_tokens
            # An answer that fits in one chunk arrives whole or not at all: no tokens can be kept.
            if partial is None and 0 < stream_tokens < generation.sampling.max_new_tokens and can_continue(generation):
                partial = PartialAnswer(generation, stream_tokens)

            try:
                result = await self._run(member, generation if partial is None else partial.rest(), session)
            except ReplicaGone as exc:
                self.resent += 1
                await self._suspect(member, str(exc))
                if partial is not None:
                    self.resent_kept_tokens += partial.tokens
                    if (finished := partial.finished()) is not None:
                        return finished
                elif relay is not None and relay.sent:
                    raise EngineError(
                        "the replica died after part of the answer was streamed, and this request cannot be continued "
                        "elsewhere (it has penalties, min_new_tokens or images): send it again"
                    ) from exc
            else:
                return result if partial is None else partial.whole(result)
        raise EngineError(f"{MAX_ATTEMPTS} replicas died while serving this request")

    async def _run(self, member: Member, generation: Generation, session: str | None) -> GenerationResult:
        tokens = len(generation.input_ids) + generation.sampling.max_new_tokens

        self._calls += 1
        number = self._calls
        member.in_flight[number] = (generation.rid, session)
        member.in_flight_tokens += tokens
        try:
            return await member.started.generate(generation)
        finally:
            del member.in_flight[number]
            member.in_flight_tokens -= tokens

    def pick(self, session: str | None) -> Member | None:
        """Return the replica for a request of `session`, or None when none serves."""
        serving = [self.members[0]] if len(self.members) == 1 else self.members.serving
        if not serving or not serving[0].serves:
            return None

        known = self._sessions.get(session) if session is not None else None
        if len(serving) == 1:
            member = serving[0]
        else:
            member = min(serving, key=lambda m: m.in_flight_tokens)
            if known is not None and known.serves and not _overloaded(known, serving):
                member = known

        if session is not None and known is not member:
            self.moved += known is not None
            self._sessions[session] = member
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        elif session is not None:
            self._sessions.move_to_end(session)
        return member

    async def _wait_for_member(self, session: str | None, *, new: bool) -> Member:
        """Wait until a replica serves; a new request also waits while others end before a pause.

        Raises:
            EngineError: none served in time, or none ever will.
        """
        member: Member | None = None

        def found() -> bool:
            nonlocal member
            if (failure := self.failure) is not None:
                raise EngineError(failure)
            member = None if new and self._draining else self.pick(session)
            return member is not None

        try:
            async with asyncio.timeout(self._start_timeout_s):
                await self.members.wait_until(found)
        except TimeoutError:
            raise EngineError(f"no replica served within {self._start_timeout_s:.0f} s") from None
        assert member is not None
        return member

    async def _suspect(self, member: Member, reason: str) -> None:
        """Fence a replica that lost a request: it gets no more requests until it is healthy."""
        if member.serves:
            await self.members.fence(member, reason)

    # Administration

    async def abort(self, rid: str | None = None, session: str | None = None) -> int:
        """Abort a request, a session's requests, or (neither given) all; return how many."""
        if session is None:
            counts = await self.members.each(lambda replica: replica.abort(rid))
        else:
            of_session = [(m, r) for m in self.members.serving for r, s in m.in_flight.values() if s == session]
            counts = await asyncio.gather(
                *(member.started.abort(one) for member, one in of_session), return_exceptions=True
            )
        return sum(count for count in counts if isinstance(count, int))

    async def pause(self, mode: RouterPause) -> None:
        """Stop sampling. `wait` first lets the requests in flight end, and makes new ones wait."""
        if mode == "wait":
            self._draining = True
            await self.members.wait_until(lambda: not self._admitted)
        paused: PauseMode = "in_place" if mode == "wait" else mode
        self._paused = paused  # before the calls: a replica admitted meanwhile must pause too
        await self.members.each(lambda replica: replica.pause(paused))

    async def resume(self) -> None:
        self._paused = None
        self._draining = False
        await self.members.each(lambda replica: replica.resume())
        await self.members.notify()

    async def flush_cache(self) -> None:
        await self.members.each(lambda replica: replica.flush_cache())

    async def memory(self, what: Literal["release", "resume"], tags: Sequence[str] | None) -> None:
        """Release the device memory of all replicas, or allocate it again.

        Memory that is released already, or was never released, is left as it is: SGLang would end.
        Replicas are then asked without tags, so that an engine that cannot still refuses.

        Args:
            tags: `weights`, `kv_cache`; None: both.

        Raises:
            Conflict: an engine cannot, or requests are in flight.
        """
        async with self.weights.changing:  # a replica that is being admitted must not miss it
            await self._memory(what, set(MEMORY_TAGS if tags is None else tags))

    async def _memory(self, what: Literal["release", "resume"], wanted: set[str]) -> None:
        changed = sorted(wanted - self._released if what == "release" else wanted & self._released)
        if changed and what == "release" and (busy := self._admitted):
            raise Conflict(f"memory cannot be released while {busy} requests are in flight; pause with mode wait first")

        await self.members.each(lambda replica: replica.memory(what, changed))
        if what == "release":
            self._released.update(changed)
        else:
            self._released.difference_update(changed)

    async def refresh(self) -> None:
        """Update the counters of all replicas that answer in time."""

        async def one(member: Member) -> None:
            async with asyncio.timeout(REFRESH_TIMEOUT_S):
                await member.started.refresh()

        await asyncio.gather(*(one(member) for member in self.members.serving), return_exceptions=True)

    async def close(self) -> None:
        await self.members.close()


def _overloaded(member: Member, serving: Sequence[Member]) -> bool:
    average = sum(other.in_flight_tokens for other in serving) / len(serving)
    return member.in_flight_tokens > OVERLOAD_FACTOR * average + OVERLOAD_TOKENS
