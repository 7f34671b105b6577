"""Requests to replicas: a session stays where its prefix is cached, a new one goes where the least is under way."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rollout_server.engines.base import (
    AnswerChunk,
    BroadcastWeights,
    EngineError,
    EngineInfo,
    Generation,
    GenerationResult,
    PauseMode,
    RunningMode,
    UpdateGroup,
    WeightsConfirmation,
    WeightsError,
    WeightsSource,
)
from rollout_server.errors import HttpError
from rollout_server.replica.base import Replica, ReplicaGone
from rollout_server.router.checksums import agreed, check, lasting
from rollout_server.router.partial_answer import PartialAnswer, can_go_on

log = logging.getLogger(__name__)

MAX_SESSIONS = 100_000
"""Sessions remembered; the ones unused for longest are forgotten first."""

OVERLOAD_FACTOR = 1.5
OVERLOAD_TOKENS = 2048
"""A session leaves its replica when that has so many times the average of tokens under way, and so many more."""

REFRESH_TIMEOUT_S = 1.0

MAX_ATTEMPTS = 8
"""Replicas that may die under one request."""

RouterPause = Literal["retract", "in_place", "abort", "wait"]
MemberState = Literal["serving", "starting", "fenced", "failed"]


class Overloaded(Exception):
    """The queue is full; come back in `retry_after_s` seconds."""

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__(f"{waiting} requests are under way, which is the limit")
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class Member:
    """A replica, and what the router knows of it."""

    replica: Replica
    state: MemberState = "serving"
    reason: str = ""
    in_flight: dict[int, tuple[str, str | None]] = field(default_factory=dict)  # (rid, session) by number of the call
    in_flight_tokens: int = 0
    fenced: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)  # set when it is fenced

    @property
    def serves(self) -> bool:
        return self.state == "serving"


class Router:
    """Routes generations, and sends what administrates to all serving replicas at once.

    All serving replicas serve the same model at the same version: one that cannot follow is fenced, which means that
    nothing is sent to it any more and that its requests go to the others.

    Args:
        replicas: those that serve from the start.
        info: facts about the engine, when there are no replicas yet.
        version: of the weights that all of them serve at the start.
        source: where replicas get that version; None: it is the model's own.
        max_in_flight: requests that may be under way, queued ones included; None: no limit.
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
        self.members = [Member(replica) for replica in replicas]
        assert self.members or info is not None
        self.info = info or self.members[0].replica.info
        self.changing = asyncio.Lock()
        self.moved = 0
        self.resent = 0
        self.resent_kept_tokens = 0
        self._version = version
        self._source = source
        self._checksums: dict[str, str] = {}
        self._groups: dict[str, list[Replica]] = {}
        self._paused: PauseMode | None = None
        self._held = False
        self._max_in_flight = max_in_flight
        self._start_timeout_s = start_timeout_s
        self._sessions: OrderedDict[str, Member] = OrderedDict()
        self._calls = 0
        self._in_flight = 0
        self._changed = asyncio.Condition()

    # What is true now

    @property
    def serving(self) -> list[Member]:
        return [member for member in self.members if member.serves]

    @property
    def weight_version(self) -> str:
        """The version that every serving replica has confirmed."""
        return self.members[0].replica.weight_version if self._version is None else self._version

    @property
    def source(self) -> WeightsSource | None:
        """Where a replica that comes later gets the current version; None: it is the model's own."""
        return self._source

    @property
    def checksum(self) -> str | None:
        """Of the current version, as the replicas confirmed it; None: it is the model's own."""
        return next(iter(self._checksums.values()), None)

    @property
    def paused(self) -> PauseMode | None:
        return self._paused

    @property
    def in_flight(self) -> int:
        """Requests taken in and not answered."""
        return self._in_flight

    @property
    def failure(self) -> str | None:
        """Why nothing can be generated any more, or None."""
        reasons = []
        for member in self.members:
            reason = member.reason if member.state == "failed" else member.replica.failure
            if not reason:
                return None
            reasons.append(reason)
        return reasons[0] if reasons else None

    # Generating

    async def generate(self, generation: Generation, session: str | None = None) -> GenerationResult:
        """Generate on the session's replica; on another one when that dies.

        Raises:
            Overloaded: too many requests are under way.
            EngineError: the replica failed the request, or none serves.
        """
        if self._max_in_flight is not None and self._in_flight >= self._max_in_flight:
            raise Overloaded(self._in_flight, retry_after_s=1.0)
        self._in_flight += 1
        try:
            return await self._generate(generation, session)
        finally:
            self._in_flight -= 1

    async def _generate(self, generation: Generation, session: str | None) -> GenerationResult:
        kept: PartialAnswer | None = None
        told = _Told.of(generation)
        for _ in range(MAX_ATTEMPTS):
            member = self.pick(session) if not self._held else None
            if member is None:
                member = await self._wait_for_member(session)
            stream_tokens = member.replica.stream_tokens
            # An answer of one piece has nothing to be kept of.
            if kept is None and 0 < stream_tokens < generation.sampling.max_new_tokens and can_go_on(generation):
                kept = PartialAnswer(generation, stream_tokens)
            try:
                result = await self._run(member, generation if kept is None else kept.rest(), session)
            except ReplicaGone as exc:
                self.resent += 1
                await self._suspect(member, str(exc))
                if kept is not None:
                    self.resent_kept_tokens += kept.tokens
                    if (finished := kept.finished()) is not None:
                        return finished
                elif told is not None and told.any:
                    raise EngineError(
                        "its replica died, and what was streamed of the answer cannot be gone on with"
                    ) from exc
            else:
                return result if kept is None else kept.whole(result)
        raise EngineError(f"{MAX_ATTEMPTS} replicas died under this request")

    async def _run(self, member: Member, generation: Generation, session: str | None) -> GenerationResult:
        tokens = len(generation.input_ids) + generation.sampling.max_new_tokens
        self._calls += 1
        number = self._calls
        member.in_flight[number] = (generation.rid, session)
        member.in_flight_tokens += tokens
        try:
            return await member.replica.generate(generation)
        finally:
            del member.in_flight[number]
            member.in_flight_tokens -= tokens
            if self._held and not member.in_flight:
                await self._tell()

    def pick(self, session: str | None) -> Member | None:
        """The replica for a request of `session`, or None when none serves."""
        serving = self.members if len(self.members) == 1 else self.serving
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

    async def _wait_for_member(self, session: str | None) -> Member:
        try:
            async with asyncio.timeout(self._start_timeout_s), self._changed:
                while True:
                    if (failure := self.failure) is not None:
                        raise EngineError(failure)
                    if not self._held and (member := self.pick(session)) is not None:
                        return member
                    await self._changed.wait()
        except TimeoutError:
            raise EngineError(f"no replica served for {self._start_timeout_s:.0f} s") from None

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # Who serves

    async def admit(self, member: Member) -> None:
        """Let a replica that serves the current version take requests."""
        member.state, member.reason = "serving", ""
        member.left.clear()
        await self._tell()

    async def fence(self, member: Member, reason: str, state: MemberState = "fenced") -> None:
        """Send nothing to it any more, and its requests to the others."""
        if member.state == "serving":
            member.fenced += 1
            log.error(
                "replica %s is fenced, its %d requests go to others: %s",
                member.replica.name, len(member.in_flight), reason,
            )  # fmt: skip
        member.state, member.reason = state, reason
        await member.replica.close()
        member.left.set()
        await self._tell()

    async def _suspect(self, member: Member, reason: str) -> None:
        """A request was lost on it: nobody else shall be sent there before it is known to be well."""
        if member.serves:
            await self.fence(member, reason)

    # Administration

    async def abort(self, rid: str | None = None, session: str | None = None) -> int:
        """Abort a request, all of a session, or (neither given) all; returns how many were aborted."""
        if session is None:
            counts = await self._each(lambda replica: replica.abort(rid))
            return sum(count for count in counts if isinstance(count, int))
        of_session = [(m, r) for m in self.serving for r, s in m.in_flight.values() if s == session]
        counts = await asyncio.gather(*(member.replica.abort(r) for member, r in of_session), return_exceptions=True)
        return sum(count for count in counts if isinstance(count, int))

    async def pause(self, mode: RouterPause) -> None:
        """Return when nothing is sampled. `wait` first lets the requests that are under way end, and holds new ones."""
        if mode == "wait":
            self._held = True
            async with self._changed:
                await self._changed.wait_for(lambda: not any(member.in_flight for member in self.members))
        self._paused = "in_place" if mode == "wait" else mode
        await self._each(lambda replica: replica.pause(self._paused or "in_place"))

    async def resume(self) -> None:
        self._paused = None
        self._held = False
        await self._each(lambda replica: replica.resume())
        await self._tell()

    async def flush_cache(self) -> None:
        await self._each(lambda replica: replica.flush_cache())

    async def update_weights(
        self, source: WeightsSource, version: str, running: RunningMode = "retract"
    ) -> WeightsConfirmation:
        """Make every serving replica serve `source`; the version is current when all that go on serving confirmed it by
        the same checksum. The others are fenced.

        Raises:
            WeightsError: none of them can serve it; the old version goes on.
            EngineError: there is none that serves.
            HttpError: 409, when a serving replica is not in the group of a broadcast.
        """
        async with self.changing:
            members = self.serving
            if isinstance(source, BroadcastWeights):
                self._check_group(source.group, members)
            results = await asyncio.gather(
                *(member.replica.update_weights(source, version, running) for member in members), return_exceptions=True
            )
            receipts = {m: r for m, r in zip(members, results, strict=True) if isinstance(r, WeightsConfirmation)}
            failed = {m: r for m, r in zip(members, results, strict=True) if isinstance(r, BaseException)}
            if failed and isinstance(source, BroadcastWeights):
                self._groups.pop(source.group, None)
            for member, error in failed.items():
                # Where all refuse the weights, the weights are wrong; where one does, that one is.
                if receipts or not isinstance(error, WeightsError):
                    await self.fence(member, f"it did not take version {version}: {error}")
            checksums = agreed(source.checksum, [receipt.checksum for receipt in receipts.values()])
            confirmed = 0
            for member, receipt in receipts.items():
                try:
                    check(receipt, checksums)
                    confirmed += 1
                except WeightsError as exc:
                    await self.fence(member, str(exc))
            if not confirmed:
                refusals = [error for error in failed.values() if isinstance(error, WeightsError)]
                raise refusals[0] if refusals else EngineError(f"no replica serves that could take version {version}")
            self._version, self._source, self._checksums = version, lasting(source), checksums
            return WeightsConfirmation(version, next(iter(checksums.values())))

    def check_receipt(self, receipt: WeightsConfirmation) -> None:
        """Compare what a replica has loaded now with what the others serve.

        Raises:
            WeightsError: it is something else.
        """
        check(receipt, self._checksums)

    async def join_weights_group(self, group: UpdateGroup) -> None:
        """Let all serving replicas join: the first one as rank `group.rank`.

        Raises:
            HttpError: 409, when the group is made for fewer ranks than the serving replicas have.
            WeightsError: it did not come about.
        """
        async with self.changing:
            members = self.serving
            ranked, rank = [], group.rank
            for member in members:
                ranked.append((member, replace(group, rank=rank)))
                rank += member.replica.ranks
            if rank > group.world_size:  # it may hold others too: replicas of this one are servers as well
                raise HttpError(
                    409,
                    "conflict",
                    f"the serving replicas make {rank} ranks of it, counted from rank_offset {group.rank}",
                    "world_size",
                )
            self._groups.pop(group.name, None)
            await self._each(lambda replica: replica.leave_weights_group(group.name))
            results = await asyncio.gather(
                *(member.replica.join_weights_group(own) for member, own in ranked), return_exceptions=True
            )
            for result in results:
                if isinstance(result, BaseException):
                    await self._each(lambda replica: replica.leave_weights_group(group.name))
                    raise result
            self._groups[group.name] = [member.replica for member in members]

    async def leave_weights_group(self, name: str) -> bool:
        """Close a group everywhere; False: nobody was in one of this name."""
        async with self.changing:
            self._groups.pop(name, None)
            return any(await self._each(lambda replica: replica.leave_weights_group(name)))

    def _check_group(self, name: str, members: Sequence[Member]) -> None:
        # A replica that was started again is another one, and in no group.
        joined = self._groups.get(name, [])
        if len(joined) != len(members) or any(member.replica not in joined for member in members):
            raise HttpError(
                409, "conflict", f"group {name!r} is not one of all serving replicas: initialize it again", "group_name"
            )

    async def memory(self, what: Literal["release", "resume"], tags: Sequence[str] | None) -> None:
        """Release or take again the device memory of all replicas.

        Raises:
            HttpError: 409 where an engine cannot.
        """
        await self._each(lambda replica: replica.memory(what, tags))

    async def refresh(self) -> None:
        """Bring the replicas' counters up to date, those of replicas that answer in time."""

        async def one(member: Member) -> None:
            async with asyncio.timeout(REFRESH_TIMEOUT_S):
                await member.replica.refresh()

        await asyncio.gather(*(one(member) for member in self.serving), return_exceptions=True)

    async def close(self) -> None:
        await asyncio.gather(*(member.replica.close() for member in self.members))

    async def _each(self, call: Callable[[Replica], Awaitable[Any]]) -> list[Any]:
        """Call all serving replicas at once. One that does not answer is fenced; what another raises is raised."""
        members = self.serving
        results = await asyncio.gather(*(call(member.replica) for member in members), return_exceptions=True)
        errors = []
        for member, result in zip(members, results, strict=True):
            if isinstance(result, ReplicaGone):
                await self.fence(member, str(result))
            elif isinstance(result, BaseException):
                errors.append(result)
        if errors:
            raise errors[0]
        return results


class _Told:
    """Whether the listener of a request has heard anything."""

    def __init__(self, listener: Callable[[AnswerChunk], None]) -> None:
        self._listener = listener
        self.any = False

    @classmethod
    def of(cls, generation: Generation) -> _Told | None:
        """Listens in between, if anybody listens."""
        if generation.on_chunk is None:
            return None
        told = cls(generation.on_chunk)
        generation.on_chunk = told
        return told

    def __call__(self, piece: AnswerChunk) -> None:
        self.any = True
        self._listener(piece)


def _overloaded(member: Member, serving: Sequence[Member]) -> bool:
    average = sum(other.in_flight_tokens for other in serving) / len(serving)
    return member.in_flight_tokens > OVERLOAD_FACTOR * average + OVERLOAD_TOKENS
