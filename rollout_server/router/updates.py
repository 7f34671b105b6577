"""Change the policy version that all replicas serve, and keep the replicas equal."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from rollout_server.engines.base import BroadcastWeights, RunningMode, UpdateGroup, WeightsConfirmation, WeightsSource
from rollout_server.errors import Conflict, EngineError, WeightsError
from rollout_server.replica.base import Replica
from rollout_server.router.checksums import agreed, check, lasting
from rollout_server.router.members import Member, Members


class WeightUpdates:
    """The current version of a router's replicas, and every change to it.

    A replica that cannot follow an update is fenced, so that all serving replicas serve the same
    weights.

    Args:
        members: the replicas.
        version: the version that all of them serve at the start.
        source: where a replica that starts later loads that version from; None: it is the model's
            own.
    """

    def __init__(self, members: Members, version: str, source: WeightsSource | None = None) -> None:
        self._members = members
        self._version = version
        self._source = source
        self._checksums: dict[str, str] = {}
        self._count = 0
        self._groups: dict[str, list[Replica]] = {}
        self._lock = asyncio.Lock()

    @property
    def version(self) -> str:
        """The version that every serving replica has confirmed."""
        return self._version

    @property
    def source(self) -> WeightsSource | None:
        """Where a replica that starts later loads the current version from; None: it is the model's
        own."""
        return self._source

    @property
    def count(self) -> int:
        """How many updates there have been: a version's name may stay the same in an update."""
        return self._count

    @property
    def checksum(self) -> str | None:
        """Checksum of the current version, as the replicas confirmed it; None: it is the model's
        own."""
        return next(iter(self._checksums.values()), None)

    @property
    def changing(self) -> asyncio.Lock:
        """Held while the version or an update group changes."""
        return self._lock

    async def update(
        self, source: WeightsSource, version: str, running: RunningMode = "retract"
    ) -> WeightsConfirmation:
        """Load `source` into every serving replica as `version`.

        The version becomes current when all replicas that keep serving have confirmed it by the
        same checksum. The others are fenced.

        Raises:
            WeightsError: no replica can serve these weights; the old version stays in service.
            EngineError: no replica serves.
            Conflict: a serving replica is not in the group of a broadcast.
        """
        async with self._lock:
            members = self._members.serving
            if isinstance(source, BroadcastWeights):
                self._check_group(source.group, members)
            results = await asyncio.gather(
                *(member.started.update_weights(source, version, running) for member in members),
                return_exceptions=True,
            )
            outcomes = list(zip(members, results, strict=True))
            confirmed = {m: r for m, r in outcomes if isinstance(r, WeightsConfirmation)}
            failed = {m: r for m, r in outcomes if isinstance(r, BaseException)}

            # A broadcast that failed anywhere leaves its group unusable: drop it before anything
            # can raise.
            if failed and isinstance(source, BroadcastWeights):
                self._groups.pop(source.group, None)

            # First fence the replicas that failed. Weights that all replicas refuse are wrong
            # themselves, and no replica is fenced; if only some refuse, those replicas are wrong.
            for member, error in failed.items():
                if confirmed or not isinstance(error, WeightsError):
                    await self._members.fence(member, f"it did not load version {version}: {error}")

            # Only then compare checksums: a replica that failed must not influence which checksum
            # counts.
            checksums = agreed(source.checksum, [confirmation.checksum for confirmation in confirmed.values()])
            serving = 0
            for member, confirmation in confirmed.items():
                try:
                    check(confirmation, checksums)
                    serving += 1
                except WeightsError as exc:
                    await self._members.fence(member, str(exc))

            if not serving:
                refusals = [error for error in failed.values() if isinstance(error, WeightsError)]
                raise refusals[0] if refusals else EngineError(f"no serving replica could load version {version}")

            # Last, so that /server_info never names a version that is not served everywhere.
            self._version, self._source, self._checksums = version, lasting(source), checksums
            self._count += 1
            return WeightsConfirmation(version, next(iter(checksums.values())))

    async def rename(self, version: str) -> None:
        """Give the served weights another name, in every serving replica. One that does not follow
        is fenced."""
        async with self._lock:
            members = self._members.serving
            results = await asyncio.gather(
                *(member.started.rename_weights(version) for member in members), return_exceptions=True
            )
            for member, result in zip(members, results, strict=True):
                if isinstance(result, BaseException):
                    await self._members.fence(member, f"it did not rename its weights to {version}: {result}")
            if not self._members.serving:
                raise EngineError(f"no serving replica could rename its weights to {version}")
            self._version = version

    def check_confirmation(self, confirmation: WeightsConfirmation) -> None:
        """Compare what a restarted replica has loaded with what the others serve.

        Raises:
            WeightsError: they differ.
        """
        check(confirmation, self._checksums)

    async def join_group(self, group: UpdateGroup) -> None:
        """Let all serving replicas join an update group, the first one as rank `group.rank`.

        Raises:
            Conflict: the group has room for fewer ranks than the serving replicas need.
            WeightsError: a replica could not join; all have left the group again.
        """
        async with self._lock:
            members = self._members.serving
            ranked, rank = [], group.rank
            for member in members:
                ranked.append((member, replace(group, rank=rank)))
                rank += member.ranks
            if rank > group.world_size:  # not "!=": other servers may hold ranks of the same group
                raise Conflict(
                    f"the serving replicas need ranks {group.rank} to {rank - 1} of a group of {group.world_size}: "
                    f"make the group for {rank} ranks",
                    "world_size",
                )

            self._groups.pop(group.name, None)
            await self._members.each(lambda replica: replica.leave_weights_group(group.name))
            results = await asyncio.gather(
                *(member.started.join_weights_group(own) for member, own in ranked), return_exceptions=True
            )
            for result in results:
                if isinstance(result, BaseException):
                    await self._members.each(lambda replica: replica.leave_weights_group(group.name))
                    raise result
            self._groups[group.name] = [member.started for member in members]

    async def leave_group(self, name: str) -> bool:
        """Close an update group on all replicas; return False if no replica was in it."""
        async with self._lock:
            self._groups.pop(name, None)
            return any(await self._members.each(lambda replica: replica.leave_weights_group(name)))

    def _check_group(self, name: str, members: Sequence[Member]) -> None:
        # Replicas are compared by identity: one that was restarted is a new object, and in no
        # group.
        joined = self._groups.get(name, [])
        if len(joined) != len(members) or any(member.replica not in joined for member in members):
            raise Conflict(
                f"group {name!r} does not contain exactly the serving replicas: initialize it again", "group_name"
            )
