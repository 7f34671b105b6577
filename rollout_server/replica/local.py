"""The embedded engine of this process as a replica."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

from rollout_server.engines.base import (
    Engine,
    EngineInfo,
    EngineStats,
    Generation,
    GenerationResult,
    PauseMode,
    ReleasesMemory,
    RunningMode,
    UpdateGroup,
    WeightsConfirmation,
    WeightsSource,
)
from rollout_server.errors import Conflict
from rollout_server.replica.base import probe_generation

PROBE_CHECK_S = 0.05


class LocalReplica:
    """Passes every call to an engine in this process."""

    stream_tokens = 0
    ranks = 1

    def __init__(self, engine: Engine, name: str = "local") -> None:
        self._engine = engine
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def weight_version(self) -> str:
        return self._engine.weight_version

    @property
    def failure(self) -> str | None:
        return self._engine.failure

    async def generate(self, generation: Generation) -> GenerationResult:
        return await self._engine.generate(generation)

    async def abort(self, rid: str | None) -> int:
        return await self._engine.abort(rid)

    async def pause(self, mode: PauseMode) -> None:
        await self._engine.pause(mode)

    async def resume(self) -> None:
        await self._engine.resume()

    async def flush_cache(self) -> None:
        await self._engine.flush_cache()

    async def update_weights(
        self, source: WeightsSource, version: str, running: RunningMode = "retract"
    ) -> WeightsConfirmation:
        return await self._engine.update_weights(source, version, running)

    async def rename_weights(self, version: str) -> None:
        await self._engine.rename_weights(version)

    async def join_weights_group(self, group: UpdateGroup) -> None:
        await self._engine.join_weights_group(group)

    async def leave_weights_group(self, name: str) -> bool:
        return await self._engine.leave_weights_group(name)

    async def memory(self, what: Literal["release", "resume"], tags: Sequence[str] | None) -> None:
        if not isinstance(self._engine, ReleasesMemory):
            raise Conflict(f"the {self.info.name} engine cannot {what} its memory; use SGLang on a GPU for that")
        await self._engine.memory(what, tags)

    async def probe(self) -> None:
        """Return once any token has been sampled: a full engine may sample for other requests
        first."""
        before = self.stats().sampled_tokens
        probe = asyncio.create_task(self._engine.generate(probe_generation()))
        try:
            while not probe.done() and self.stats().sampled_tokens == before:
                await asyncio.wait([probe], timeout=PROBE_CHECK_S)
            if probe.done():
                await probe
        finally:
            probe.cancel()

    async def alive(self) -> None:
        """Do nothing: the engine is in this process."""

    async def refresh(self) -> None:
        """Do nothing: the engine's counters are in this process."""

    def stats(self) -> EngineStats:
        return self._engine.stats()

    async def close(self) -> None:
        await self._engine.close()
