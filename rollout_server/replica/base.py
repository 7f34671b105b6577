"""The protocol of replicas, to which the router sends requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from agentloop.wire import SamplingParams
from rollout_server.engines.base import (
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


class Replica(Protocol):
    """One engine, in any process."""

    @property
    def name(self) -> str: ...

    @property
    def info(self) -> EngineInfo: ...

    @property
    def weight_version(self) -> str: ...

    @property
    def failure(self) -> str | None:
        """The reason why it will never answer again, or None."""
        ...

    @property
    def stream_tokens(self) -> int:
        """Maximum tokens of an answer that are lost when it dies; 0: all of them."""
        ...

    @property
    def ranks(self) -> int:
        """Number of ranks that it takes in an update group."""
        ...

    async def generate(self, generation: Generation) -> GenerationResult:
        """Generate.

        Raises:
            ReplicaGone: it does not answer; its other requests are lost as well.
            EngineError: it failed this request.
            RequestError: the request is wrong.
        """
        ...

    async def abort(self, rid: str | None) -> int: ...

    async def pause(self, mode: PauseMode) -> None: ...

    async def resume(self) -> None: ...

    async def flush_cache(self) -> None: ...

    async def update_weights(
        self, source: WeightsSource, version: str, running: RunningMode = "retract"
    ) -> WeightsConfirmation:
        """As `Engine.update_weights`."""
        ...

    async def rename_weights(self, version: str) -> None:
        """As `Engine.rename_weights`."""
        ...

    async def join_weights_group(self, group: UpdateGroup) -> None: ...

    async def leave_weights_group(self, name: str) -> bool: ...

    async def memory(self, what: Literal["release", "resume"], tags: Sequence[str] | None) -> None:
        """Release device memory, or allocate it again.

        Raises:
            Conflict: the engine cannot.
        """
        ...

    async def probe(self) -> None:
        """Return once it has sampled a token.

        Raises:
            EngineError: it reports that it cannot.
        """
        ...

    async def alive(self) -> None:
        """Return if it answers, paused or not.

        Raises:
            EngineError: it does not.
        """
        ...

    async def refresh(self) -> None:
        """Update `stats`."""
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None:
        """Release its connections; its requests in flight raise `ReplicaGone`."""
        ...


def probe_generation() -> Generation:
    """Return the smallest possible request."""
    return Generation("health", [0], SamplingParams(max_new_tokens=1, temperature=0.0))
