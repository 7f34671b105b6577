"""Sessions stay, new work goes where least is under way."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from agentloop.wire import SamplingParams
from rollout_server.engines.base import (
    BroadcastWeights,
    EngineInfo,
    EngineStats,
    FolderWeights,
    Generation,
    GenerationResult,
    PauseMode,
    RunningMode,
    UpdateGroup,
    WeightsConfirmation,
    WeightsSource,
)
from rollout_server.errors import Conflict, EngineError, WeightsError
from rollout_server.replica.local import LocalReplica
from rollout_server.router.router import Router


class FakeEngine:
    """Answers once `go_on` is set, and records its calls."""

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
    ) -> WeightsConfirmation:
        if isinstance(self.receives, Exception):
            raise self.receives
        self.weight_version = version
        return WeightsConfirmation(version, self.receives)

    async def join_weights_group(self, group: UpdateGroup) -> None:
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
    await router.weights.update(FolderWeights(tmp_path), "3")
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


def two_replicas(*receives: str | Exception) -> tuple[list[FakeEngine], Router]:
    engines = [FakeEngine() for _ in receives]
    for engine, one in zip(engines, receives, strict=True):
        engine.receives = one
    return engines, Router([LocalReplica(engine, str(i)) for i, engine in enumerate(engines)])


async def test_a_replica_that_disagrees_with_the_trainer_is_fenced(tmp_path: Path) -> None:
    engines, router = two_replicas("xxh3:aa", "xxh3:bb")
    receipt = await router.weights.update(FolderWeights(tmp_path, "xxh3:bb"), "1")
    assert [member.state for member in router.members] == ["fenced", "serving"]
    assert (receipt.checksum, router.weights.version, router.weights.checksum) == ("xxh3:bb", "1", "xxh3:bb")
    assert "xxh3:aa" in router.members[0].reason
    engines[1].go_on.set()
    await router.generate(generation("a"))
    assert engines[0].asked == ["close"]


async def test_a_replica_that_disagrees_with_most_is_fenced(tmp_path: Path) -> None:
    _, router = two_replicas("xxh3:aa", "xxh3:bb", "xxh3:bb")
    await router.weights.update(FolderWeights(tmp_path), "1")
    assert [member.state for member in router.members] == ["fenced", "serving", "serving"]


async def test_engines_with_checksums_of_their_own_are_compared_among_themselves(tmp_path: Path) -> None:
    _, router = two_replicas("xxh3:aa", "sglang:11", "sglang:11", "sglang:22")
    await router.weights.update(FolderWeights(tmp_path, "xxh3:aa"), "1")
    assert [member.state for member in router.members] == ["serving", "serving", "serving", "fenced"]


async def test_one_that_refuses_is_fenced_and_where_all_refuse_the_weights_are_wrong(tmp_path: Path) -> None:
    _, router = two_replicas("xxh3:aa", WeightsError("a page of mine is broken"))
    await router.weights.update(FolderWeights(tmp_path), "1")
    assert [member.state for member in router.members] == ["serving", "fenced"]
    _, router = two_replicas(WeightsError("no such file"), WeightsError("no such file"))
    with pytest.raises(WeightsError, match="no such file"):
        await router.weights.update(FolderWeights(tmp_path), "1")
    assert [member.state for member in router.members] == ["serving", "serving"]
    assert (router.weights.version, router.weights.source) == ("0", None)


async def test_where_nobody_has_the_trainers_checksum_no_version_is_current(tmp_path: Path) -> None:
    _, router = two_replicas("xxh3:aa", "xxh3:aa")
    with pytest.raises(EngineError):
        await router.weights.update(FolderWeights(tmp_path, "xxh3:bb"), "1")
    assert [member.state for member in router.members] == ["fenced", "fenced"]
    assert router.weights.source is None


async def test_a_late_replica_is_compared_with_the_others(tmp_path: Path) -> None:
    _, router = two_replicas("xxh3:aa")
    await router.weights.update(FolderWeights(tmp_path), "1")
    router.weights.check_confirmation(WeightsConfirmation("1", "xxh3:aa"))
    router.weights.check_confirmation(WeightsConfirmation("1", "sglang:77"))  # nothing to compare it with
    with pytest.raises(WeightsError, match="xxh3:bb"):
        router.weights.check_confirmation(WeightsConfirmation("1", "xxh3:bb"))


GROUP = UpdateGroup("weights", "127.0.0.1", 1234, 1, 3, "gloo")


async def test_replicas_take_the_ranks_of_a_group_in_their_order() -> None:
    engines, router = two_replicas("xxh3:aa", "xxh3:aa")
    await router.weights.join_group(GROUP)
    assert [engine.asked for engine in engines] == [["join as 1 of 3"], ["join as 2 of 3"]]
    with pytest.raises(Conflict, match="3 ranks"):
        await router.weights.join_group(replace(GROUP, world_size=2))


async def test_a_broadcast_is_for_the_replicas_that_joined_and_its_copy_for_later_ones(tmp_path: Path) -> None:
    _, router = two_replicas("xxh3:aa", "xxh3:aa")
    source = BroadcastWeights(("a",), ("float32",), ((1,),), "weights", copy=tmp_path)
    with pytest.raises(Conflict, match="initialize it again"):
        await router.weights.update(source, "1")
    await router.weights.join_group(GROUP)
    await router.weights.update(source, "1")
    assert router.weights.source == FolderWeights(tmp_path)
    router.members[1].replica = LocalReplica(FakeEngine(), "started again")
    with pytest.raises(Conflict, match="initialize it again"):
        await router.weights.update(source, "2")
