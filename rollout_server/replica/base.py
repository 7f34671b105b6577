"""What the router routes to."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal, Protocol

from agentloop.wire import SamplingParams
from rollout_server.engines.base import (
    Engine,
    EngineError,
    EngineInfo,
    EngineStats,
    Generation,
    GenerationResult,
    PauseMode,
    RunningMode,
    UpdateGroup,
    WeightsConfirmation,
    WeightsSource,
)
from rollout_server.errors import HttpError


class ReplicaGone(EngineError):
    """The replica does not answer any more; the request is right and can be sent to another one."""


class Replica(Protocol):
    """One engine, wherever it runs."""

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
    def stream_tokens(self) -> int:
        """How many tokens of an answer are lost at most when it dies; 0: all of them."""
        ...

    async def generate(self, generation: Generation) -> GenerationResult:
        """Generate.

        Raises:
            ReplicaGone: it does not answer; its other requests are lost as well.
            EngineError: it failed this request.
        """
        ...

    async def abort(self, rid: str | None) -> int: ...

    async def pause(self, mode: PauseMode) -> None: ...

    async def resume(self) -> None: ...

    async def flush_cache(self) -> None: ...

    @property
    def ranks(self) -> int:
        """How many ranks of a weights group it takes."""
        ...

    async def update_weights(
        self, source: WeightsSource, version: str, running: RunningMode = "retract"
    ) -> WeightsConfirmation:
        """As `Engine.update_weights`."""
        ...

    async def join_weights_group(self, group: UpdateGroup) -> None: ...

    async def leave_weights_group(self, name: str) -> bool: ...

    async def memory(self, what: Literal["release", "resume"], tags: Sequence[str] | None) -> None:
        """Give device memory back, or take it again.

        Raises:
            HttpError: 409: it cannot.
        """
        ...

    async def probe(self) -> None:
        """Return once it has sampled a token.

        Raises:
            EngineError: it says that it cannot.
        """
        ...

    async def alive(self) -> None:
        """Return if it answers at all, paused or not.

        Raises:
            EngineError: it does not.
        """
        ...

    async def refresh(self) -> None:
        """Bring `stats` up to date."""
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None:
        """Let go of it; requests that it works on raise `ReplicaGone`."""
        ...


class LocalReplica:
    """The embedded engine of this process."""

    stream_tokens = 0
    ranks = 1

    def __init__(self, engine: Engine, name: str = "local") -> None:
        self._engine = engine
        self._name = name
        # Calls that add nothing here.
        self.generate = engine.generate
        self.abort = engine.abort
        self.pause = engine.pause
        self.resume = engine.resume
        self.flush_cache = engine.flush_cache
        self.update_weights = engine.update_weights
        self.join_weights_group = engine.join_weights_group
        self.leave_weights_group = engine.leave_weights_group
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

    async def memory(self, what: Literal["release", "resume"], tags: Sequence[str] | None) -> None:
        raise HttpError(409, "conflict", f"the {self.info.name} engine cannot {what} its memory; SGLang on a GPU can")

    async def probe(self) -> None:
        # A full engine samples for others first: that will do.
        before = self.stats().sampled_tokens
        probe = asyncio.create_task(self._engine.generate(probe_generation()))
        try:
            while not probe.done() and self.stats().sampled_tokens == before:
                await asyncio.wait([probe], timeout=0.05)
            if probe.done():
                await probe
        finally:
            probe.cancel()

    async def alive(self) -> None:
        """It is in this process."""

    async def refresh(self) -> None:
        """Nothing to do: the engine's counters are in this process."""


def probe_generation() -> Generation:
    """The smallest request there is."""
    return Generation("health", [0], SamplingParams(max_new_tokens=1, temperature=0.0))
