"""Sessions stay, new work goes where least is under way."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agentloop.wire import SamplingParams
from rollout_server.engines.base import (
    EngineError,
    EngineInfo,
    EngineStats,
    FolderWeights,
    Generation,
    GenerationResult,
    PauseMode,
    RunningMode,
    WeightsGroup,
    WeightsReceipt,
    WeightsSource,
)
from rollout_server.replica import LocalReplica
from rollout_server.router import Router


class FakeEngine:
    """Answers when told to, and writes down what it was asked."""

    def __init__(self) -> None:
        self.info = EngineInfo("fake", "nowhere", 100, 50)
        self.weight_version = "0"
        self.failure: str | None = None
        self.asked: list[str] = []
        self.go_on = asyncio.Event()
        self.error: EngineError | None = None
        self.receives: str | Exception = "xxh3:aa"

    async def generate(self, generation: Generation) -> GenerationResult:
        self.asked.append(generation.rid)
        await self.go_on.wait()
        if self.error:
            raise self.error
        return GenerationResult([1], [-0.5], [], "length", None, 0, self.weight_version)

    async def abort(self, rid: str | None) -> int:
        return len(self.asked)

    async def pause(self, mode: PauseMode) -> None:
        self.asked.append(f"pause {mode}")

    async def resume(self) -> None:
        self.asked.append("resume")

    async def flush_cache(self) -> None:
        self.asked.append("flush")

    async def update_weights(
        self, source: WeightsSource, version: str, running: RunningMode = "retract"
    ) -> WeightsReceipt:
        if isinstance(self.receives, Exception):
            raise self.receives
        self.weight_version = version
        return WeightsReceipt(version, self.receives)

    async def join_weights_group(self, group: WeightsGroup) -> None:
        self.asked.append(f"join as {group.rank} of {group.world_size}")

    async def leave_weights_group(self, name: str) -> bool:
        return False

    def stats(self) -> EngineStats:
        return EngineStats()

    async def close(self) -> None:
        self.asked.append("close")


def generation(rid: str, prompt: int = 10, new: int = 10) -> Generation:
    return Generation(rid, [1] * prompt, SamplingParams(max_new_tokens=new))


async def test_new_work_goes_where_the_fewest_tokens_are_under_way() -> None:
    engines = [FakeEngine() for _ in range(3)]
    router = Router([LocalReplica(engine, str(i)) for i, engine in enumerate(engines)])
    tasks = []
    for rid, size in (("a", 80), ("b", 5), ("c", 20), ("d", 5), ("e", 5), ("f", 60)):
        tasks.append(asyncio.create_task(router.generate(generation(rid, prompt=size))))
        await asyncio.sleep(0)
    assert [engine.asked for engine in engines] == [["a"], ["b", "d", "e"], ["c", "f"]]
    for engine in engines:
        engine.go_on.set()
    await asyncio.gather(*tasks)
    assert [member.in_flight_tokens for member in router.members] == [0, 0, 0]


async def test_a_session_stays_on_its_replica() -> None:
    engines = [FakeEngine() for _ in range(2)]
    router = Router([LocalReplica(engine, str(i)) for i, engine in enumerate(engines)])
    tasks = []
    for rid in ("a", "b", "c"):
        tasks.append(asyncio.create_task(router.generate(generation(rid, prompt=50), "session")))
        await asyncio.sleep(0)
    tasks.append(asyncio.create_task(router.generate(generation("other"), "other session")))
    await asyncio.sleep(0)
    assert [engine.asked for engine in engines] == [["a", "b", "c"], ["other"]]
    for engine in engines:
        engine.go_on.set()
    await asyncio.gather(*tasks)


async def test_a_failed_request_gives_its_tokens_back() -> None:
    engine = FakeEngine()
    engine.error = EngineError("broken")
    engine.go_on.set()
    router = Router([LocalReplica(engine)])
    with pytest.raises(EngineError):
        await router.generate(generation("a"))
    assert router.members[0].in_flight_tokens == 0


async def test_administration_reaches_all_replicas(tmp_path: Path) -> None:
    engines = [FakeEngine() for _ in range(2)]
    router = Router([LocalReplica(engine) for engine in engines])
    await router.pause("in_place")
    await router.update_weights(FolderWeights(tmp_path), "3")
    await router.flush_cache()
    await router.resume()
    assert await router.abort(None) == 6
    await router.close()
    for engine in engines:
        assert engine.weight_version == "3"
        assert engine.asked == ["pause in_place", "flush", "resume", "close"]


async def test_the_router_fails_when_every_replica_has() -> None:
    engines = [FakeEngine() for _ in range(2)]
    router = Router([LocalReplica(engine) for engine in engines])
    engines[0].failure = "dead"
    assert router.failure is None
    engines[1].failure = "dead too"
    assert router.failure == "dead"
