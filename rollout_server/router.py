"""Requests to replicas: a session stays where its prefix is cached, a new one goes where the least is under way."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from rollout_server.engines.base import EngineInfo, Generation, GenerationResult, PauseMode
from rollout_server.replica import Replica

MAX_SESSIONS = 100_000
"""Sessions remembered; the ones unused for longest are forgotten first."""


class Router:
    """Routes generations, and sends what administrates to all replicas at once.

    All replicas serve the same model at the same version.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
        assert replicas
        self.replicas = list(replicas)
        self._sessions: OrderedDict[str, Replica] = OrderedDict()

    @property
    def info(self) -> EngineInfo:
        return self.replicas[0].info

    @property
    def weight_version(self) -> str:
        return self.replicas[0].weight_version

    @property
    def failure(self) -> str | None:
        """Why nothing can be generated any more, or None."""
        failures = [replica.failure for replica in self.replicas]
        return None if None in failures else failures[0]

    async def generate(self, generation: Generation, session: str | None = None) -> GenerationResult:
        """Generate on the session's replica.

        Raises:
            EngineError: the replica failed.
        """
        return await self.pick(session).generate(generation)

    def pick(self, session: str | None) -> Replica:
        """The replica for a request of `session`."""
        if len(self.replicas) == 1:
            return self.replicas[0]
        known = self._sessions.get(session) if session is not None else None
        replica = known or min(self.replicas, key=lambda r: r.in_flight_tokens)
        if session is not None:
            self._sessions[session] = replica
            self._sessions.move_to_end(session)
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        return replica

    async def abort(self, rid: str | None) -> int:
        return sum(await asyncio.gather(*(replica.abort(rid) for replica in self.replicas)))

    async def pause(self, mode: PauseMode) -> None:
        await asyncio.gather(*(replica.pause(mode) for replica in self.replicas))

    async def resume(self) -> None:
        await asyncio.gather(*(replica.resume() for replica in self.replicas))

    async def flush_cache(self) -> None:
        await asyncio.gather(*(replica.flush_cache() for replica in self.replicas))

    async def update_weights(self, folder: Path, version: str) -> None:
        await asyncio.gather(*(replica.update_weights(folder, version) for replica in self.replicas))

    async def close(self) -> None:
        await asyncio.gather(*(replica.close() for replica in self.replicas))
