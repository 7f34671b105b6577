"""What the router routes to."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from rollout_server.engines.base import Engine, EngineInfo, EngineStats, Generation, GenerationResult, PauseMode


class Replica(Protocol):
    """One engine, wherever it runs. An engine behind HTTP implements the same calls."""

    @property
    def name(self) -> str: ...

    @property
    def info(self) -> EngineInfo: ...

    @property
    def weight_version(self) -> str: ...

    @property
    def failure(self) -> str | None:
        """Why it will never answer again, or None."""
        ...

    @property
    def in_flight_tokens(self) -> int:
        """Prompt and possible new tokens of the requests it works on now: what the router balances."""
        ...

    async def generate(self, generation: Generation) -> GenerationResult: ...

    async def abort(self, rid: str | None) -> int: ...

    async def pause(self, mode: PauseMode) -> None: ...

    async def resume(self) -> None: ...

    async def flush_cache(self) -> None: ...

    async def update_weights(self, folder: Path, version: str) -> None: ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...


class LocalReplica:
    """The embedded engine of this process."""

    def __init__(self, engine: Engine, name: str = "local") -> None:
        self._engine = engine
        self._name = name
        self._in_flight_tokens = 0
        # Calls that add nothing here.
        self.abort = engine.abort
        self.pause = engine.pause
        self.resume = engine.resume
        self.flush_cache = engine.flush_cache
        self.update_weights = engine.update_weights
        self.stats = engine.stats
        self.close = engine.close

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

    @property
    def in_flight_tokens(self) -> int:
        return self._in_flight_tokens

    async def generate(self, generation: Generation) -> GenerationResult:
        tokens = len(generation.input_ids) + generation.sampling.max_new_tokens
        self._in_flight_tokens += tokens
        try:
            return await self._engine.generate(generation)
        finally:
            self._in_flight_tokens -= tokens
