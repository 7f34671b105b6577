"""Replicas and sources whose faults a test controls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Literal

from agentloop.errors import ServerStartError
from agentloop.wire import VersionSpan
from rollout_server.engines.base import (
    AnswerChunk,
    EngineInfo,
    EngineStats,
    Generation,
    GenerationResult,
    RunningMode,
    UpdateGroup,
    WeightsConfirmation,
    WeightsSource,
)
from rollout_server.errors import ReplicaGone, WeightsError

INFO = EngineInfo("fake", "nowhere", 1000, 500)


def token_at(position: int) -> int:
    """Return the token that every fake replica samples at a position of the sequence."""
    return 10 + position


class FakeReplica:
    """Samples `token_at` each position; dies, hangs or refuses on demand."""

    failure: str | None = None
    ranks = 1
    info = INFO

    def __init__(self, name: str = "fake", *, version: str = "0", stream_tokens: int = 4) -> None:
        self.name = name
        self.weight_version = version
        self.stream_tokens = stream_tokens
        self.asked: list[Generation] = []
        self.calls: list[str] = []
        self.dies_after: int | None = None
        """Tokens of a request after which it dies."""
        self.refuses: WeightsError | None = None
        self.hangs = False
        self.stopped = False
        self.serves = ""
        """The weights that it loads, whatever it should load."""
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.gone = asyncio.Event()

    async def generate(self, generation: Generation) -> GenerationResult:
        self.asked.append(generation)
        start, count = len(generation.input_ids), generation.sampling.max_new_tokens
        ids = [token_at(start + i) for i in range(count)]
        logprobs = [-0.01 * (start + i) for i in range(count)]
        sent = 0
        while generation.on_chunk is not None and sent + generation.stream_tokens <= min(count, self.dies_after or 0):
            end = sent + generation.stream_tokens
            spans = [VersionSpan(version=self.weight_version, start=0, end=end)]
            generation.on_chunk(AnswerChunk(ids[sent:end], logprobs[sent:end], spans))
            sent = end
        if self.dies_after is not None:
            raise ReplicaGone(f"{self.name} died")
        waits = [asyncio.create_task(event.wait()) for event in (self.go_on, self.gone)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self.gone.is_set():
            raise ReplicaGone(f"{self.name} is gone")
        spans = [VersionSpan(version=self.weight_version, start=0, end=count)]
        return GenerationResult(ids, logprobs, spans, "length", None, 0, self.weight_version)

    async def abort(self, rid: str | None) -> int:
        self.calls.append(f"abort {rid}")
        return 1

    async def pause(self, mode: str) -> None:
        await self._stop_here()
        self.calls.append(f"pause {mode}")

    async def resume(self) -> None:
        await self._stop_here()
        self.calls.append("resume")

    async def flush_cache(self) -> None:
        self.calls.append("flush")

    async def update_weights(
        self, source: WeightsSource, version: str, running: RunningMode = "retract"
    ) -> WeightsConfirmation:
        await self._stop_here()
        if self.refuses is not None:
            raise self.refuses
        self.calls.append(f"update {version}")
        self.weight_version = version
        return WeightsConfirmation(version, f"fake:{self.serves or version}")

    async def rename_weights(self, version: str) -> None:
        self.calls.append(f"rename {version}")
        self.weight_version = version

    async def join_weights_group(self, group: UpdateGroup) -> None: ...

    async def leave_weights_group(self, name: str) -> bool:
        return False

    async def memory(self, what: Literal["release", "resume"], tags: Sequence[str] | None) -> None:
        self.calls.append(f"{what} {tags}")

    async def probe(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()

    async def alive(self) -> None:
        if self.stopped:
            await asyncio.Event().wait()

    async def refresh(self) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats()

    async def close(self) -> None:
        self.gone.set()

    async def _stop_here(self) -> None:
        """A stopped process answers nothing, until its connections are closed."""
        if self.stopped:
            await self.gone.wait()
            raise ReplicaGone(f"{self.name} is gone")


class FakeSource:
    """Makes a new replica at each start."""

    def __init__(self, name: str = "fake", make: Callable[[], Any] = FakeReplica) -> None:
        self.name = name
        self._make = make
        self.replicas: list[Any] = []
        self.failing = 0
        """Number of the next starts that fail."""
        self.fails_with: type[ServerStartError] = ServerStartError
        self.stops = 0
        self._dead = asyncio.Event()

    async def start(self) -> Any:
        await asyncio.sleep(0)
        if self.failing:
            self.failing -= 1
            raise self.fails_with(f"{self.name} does not start", "nothing to be done")
        self._dead = asyncio.Event()
        self.replicas.append(self._make())
        return self.replicas[-1]

    def die(self) -> None:
        self._dead.set()

    async def ended(self) -> str:
        await self._dead.wait()
        return "its process ended with code -9"

    async def stop(self, *, gently: bool) -> None:
        self.stops += 1
