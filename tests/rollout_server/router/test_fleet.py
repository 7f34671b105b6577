"""Replicas are started, watched, started again, and brought to the current version before they serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from agentloop.errors import ServerStartError
from agentloop.runtime.child import ChildKilled
from rollout_server.api.metrics import Metrics
from rollout_server.engines.base import FolderWeights, WeightsConfirmation
from rollout_server.errors import Conflict
from rollout_server.router.fleet import Fleet
from rollout_server.router.router import Router
from tests.rollout_server.fakes import INFO, FakeReplica, FakeSource
from tests.rollout_server.support import request


@pytest.fixture
async def fleet_of() -> AsyncIterator[Callable[..., tuple[Router, Fleet]]]:
    """Make a fleet of sources; it is closed at the end of the test."""
    fleets = []

    def make(*sources: FakeSource, **options: Any) -> tuple[Router, Fleet]:
        router = Router(info=INFO, version="0")
        settings: dict[str, Any] = {"probe_every_s": 0.01, "probe_timeout_s": 0.05, **options}
        fleets.append(Fleet(router, sources, **settings))
        return router, fleets[-1]

    yield make
    for fleet in fleets:
        await fleet.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_replica_that_was_never_started_is_reported_and_gets_no_requests(
    fleet_of: Callable[..., tuple[Router, Fleet]],
) -> None:
    router, _ = fleet_of(FakeSource("a"), FakeSource("b"))
    assert router.pick("session") is None and router.failure is None
    await router.pause("retract")
    await router.flush_cache()
    await router.refresh()
    assert [(member.state, member.weight_version, member.stats().running) for member in router.members] == [
        ("starting", "", 0), ("starting", "", 0)
    ]  # fmt: skip
    assert 'rollout_replica{replica="a",state="starting",version=""} 1.0' in Metrics(router).render().decode()
    await router.close()


async def test_a_dead_replica_is_started_again(fleet_of: Callable[..., tuple[Router, Fleet]]) -> None:
    a, b = FakeSource("a"), FakeSource("b")
    router, fleet = fleet_of(a, b)
    await fleet.start()
    assert [member.state for member in router.members] == ["serving", "serving"]
    a.die()
    await until(lambda: router.members[0].state != "serving")
    assert router.members[1].serves
    await until(lambda: len(a.replicas) == 2 and router.members[0].serves)
    assert a.stops == 1 and len(b.replicas) == 1


async def test_a_replica_that_samples_nothing_is_started_again(fleet_of: Callable[..., tuple[Router, Fleet]]) -> None:
    source = FakeSource()
    router, fleet = fleet_of(source)
    await fleet.start()
    source.replicas[0].hangs = True
    await until(lambda: len(source.replicas) == 2 and router.members[0].serves)
    assert router.members[0].fenced == 1


async def test_a_pause_is_no_hang(fleet_of: Callable[..., tuple[Router, Fleet]]) -> None:
    source = FakeSource()
    router, fleet = fleet_of(source)
    await fleet.start()
    await router.pause("in_place")
    source.replicas[0].hangs = True
    await asyncio.sleep(0.15)
    assert len(source.replicas) == 1 and router.members[0].serves


async def test_a_replica_that_hangs_in_an_update_does_not_hold_it_up(
    fleet_of: Callable[..., tuple[Router, Fleet]], tmp_path: Path
) -> None:
    a, b = FakeSource("a"), FakeSource("b")
    router, fleet = fleet_of(a, b)
    await fleet.start()
    a.replicas[0].stopped = True
    async with asyncio.timeout(10):
        await router.weights.update(FolderWeights(tmp_path), "1")
    assert router.weights.version == "1" and router.members[0].fenced == 1
    await until(lambda: len(a.replicas) == 2 and router.members[0].serves)
    assert a.replicas[1].weight_version == "1"


async def test_a_replica_that_hangs_in_a_pause_or_when_it_ends_holds_nobody_up(
    fleet_of: Callable[..., tuple[Router, Fleet]],
) -> None:
    a, b = FakeSource("a"), FakeSource("b")
    router, fleet = fleet_of(a, b)
    await fleet.start()
    async with asyncio.timeout(10):
        a.replicas[0].stopped = True
        await router.pause("in_place")
        await until(lambda: len(a.replicas) == 2 and router.members[0].serves)
        a.replicas[1].stopped = True
        await router.resume()
        await until(lambda: len(a.replicas) == 3 and router.members[0].serves)
    assert router.members[0].fenced == 2 and len(b.replicas) == 1


async def test_a_restarted_replica_serves_the_current_version_and_pauses_as_the_others(
    fleet_of: Callable[..., tuple[Router, Fleet]], tmp_path: Path
) -> None:
    a, b = FakeSource("a"), FakeSource("b")
    router, fleet = fleet_of(a, b)
    await fleet.start()
    await router.weights.update(FolderWeights(tmp_path), "7")
    await router.pause("retract")
    a.die()
    await until(lambda: len(a.replicas) == 2 and router.members[0].serves)
    assert a.replicas[1].weight_version == "7"
    assert a.replicas[1].calls[-1] == "pause retract"


async def test_a_version_that_comes_while_a_replica_catches_up_is_not_missed(
    fleet_of: Callable[..., tuple[Router, Fleet]], tmp_path: Path
) -> None:
    class Slow(FakeReplica):
        async def update_weights(self, *arguments: Any) -> WeightsConfirmation:
            await asyncio.sleep(0.1)
            return await super().update_weights(*arguments)

    a, b = FakeSource("a", Slow), FakeSource("b")
    router, fleet = fleet_of(a, b)
    await fleet.start()
    await router.weights.update(FolderWeights(tmp_path), "1")
    a.die()
    await until(lambda: len(a.replicas) == 2)
    await router.weights.update(FolderWeights(tmp_path), "2")
    await until(lambda: router.members[0].serves)
    assert a.replicas[1].weight_version == "2"


async def test_starts_that_fail_are_repeated_and_then_given_up(fleet_of: Callable[..., tuple[Router, Fleet]]) -> None:
    source = FakeSource()
    router, fleet = fleet_of(source, max_starts=2)
    await fleet.start()
    source.failing = 1
    source.die()
    await until(lambda: len(source.replicas) == 2 and router.members[0].serves)
    source.failing = 2
    source.die()
    await until(lambda: router.members[0].state == "failed")
    assert router.failure is not None and "does not start" in router.failure


async def test_a_replica_that_is_killed_while_it_is_started_again_is_not_given_up(
    fleet_of: Callable[..., tuple[Router, Fleet]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout_server.router.fleet.FIRST_BACKOFF_S", 0.0)
    source = FakeSource("a")
    router, fleet = fleet_of(source, max_starts=2)
    await fleet.start()
    source.failing, source.fails_with = 6, ChildKilled
    source.die()
    await until(lambda: len(source.replicas) == 2 and router.members[0].serves)


async def test_a_fleet_that_does_not_start_leaves_nothing(fleet_of: Callable[..., tuple[Router, Fleet]]) -> None:
    a, b = FakeSource("a"), FakeSource("b")
    b.failing = 1
    _, fleet = fleet_of(a, b)
    with pytest.raises(ServerStartError, match="b does not start"):
        await fleet.start()
    assert a.stops == 1 and b.stops == 1


@pytest.mark.parametrize(("fault", "value"), [("serves", "other weights"), ("stopped", True)])
async def test_a_restarted_replica_that_does_not_come_to_the_version_does_not_serve(
    fleet_of: Callable[..., tuple[Router, Fleet]], tmp_path: Path, fault: str, value: Any
) -> None:
    """One that loads something else, and one that hangs while it catches up."""

    def second_is_faulty() -> FakeReplica:
        replica = FakeReplica()
        if len(a.replicas) == 1:
            setattr(replica, fault, value)
        return replica

    a, b = FakeSource("a", second_is_faulty), FakeSource("b")
    router, fleet = fleet_of(a, b)
    await fleet.start()
    await router.weights.update(FolderWeights(tmp_path), "1")
    a.die()
    await until(lambda: len(a.replicas) == 3 and router.members[0].serves)
    assert a.replicas[1].asked == [] and a.replicas[2].weight_version == "1"


async def test_a_replica_that_is_killed_while_the_server_starts_is_started_again(
    fleet_of: Callable[..., tuple[Router, Fleet]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout_server.router.fleet.FIRST_BACKOFF_S", 0.0)
    a, b = FakeSource("a"), FakeSource("b")
    b.failing, b.fails_with = 2, ChildKilled
    router, fleet = fleet_of(a, b)
    await fleet.start()
    assert [member.state for member in router.members] == ["serving", "serving"]
    assert len(a.replicas) == len(b.replicas) == 1 and b.stops == 2


async def test_a_replica_that_is_killed_at_every_start_ends_the_start(
    fleet_of: Callable[..., tuple[Router, Fleet]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout_server.router.fleet.FIRST_BACKOFF_S", 0.0)
    a = FakeSource("a")
    a.failing, a.fails_with = 9, ChildKilled
    _, fleet = fleet_of(a, max_starts=3)
    with pytest.raises(ServerStartError, match="replica a did not start"):
        await fleet.start()
    assert a.failing == 6


async def test_a_replica_that_restarts_loads_weights_that_kept_their_name(
    fleet_of: Callable[..., tuple[Router, Fleet]], tmp_path: Path
) -> None:
    source = FakeSource("a")
    router, fleet = fleet_of(source)
    await fleet.start()
    await router.weights.update(FolderWeights(tmp_path), router.weights.version)
    source.die()
    await until(lambda: len(source.replicas) == 2 and router.members[0].serves)
    assert source.replicas[1].calls[0] == "update 0"


async def test_a_replica_that_restarts_takes_the_name_that_its_weights_were_given(
    fleet_of: Callable[..., tuple[Router, Fleet]],
) -> None:
    source = FakeSource("a")
    router, fleet = fleet_of(source)
    await fleet.start()
    await router.weights.rename("3")
    assert (router.weights.version, source.replicas[0].calls[-1]) == ("3", "rename 3")
    source.die()
    await until(lambda: len(source.replicas) == 2 and router.members[0].serves)
    assert source.replicas[1].weight_version == "3"


async def test_replicas_that_join_serve_the_current_version_and_those_that_leave_lose_no_request(
    fleet_of: Callable[..., tuple[Router, Fleet]], tmp_path: Path
) -> None:
    made: dict[int, FakeSource] = {}

    def make(number: int) -> FakeSource:
        made[number] = FakeSource(f"r{number}")
        return made[number]

    router, fleet = fleet_of(make(0), make(1), make_source=make)
    await fleet.start()
    await router.weights.update(FolderWeights(tmp_path), "7")
    await router.pause("in_place")
    await fleet.scale(4)
    await until(lambda: len(router.members.serving) == 4)
    assert [member.name for member in router.members] == ["r0", "r1", "r2", "r3"]
    assert made[3].replicas[0].calls == ["update 7", "pause in_place"]
    await router.resume()

    for source in made.values():
        source.replicas[0].go_on.clear()
    answers = []
    for _ in range(12):
        answers.append(asyncio.create_task(router.generate(request(range(5), new=10))))
        await asyncio.sleep(0)
    assert all(member.in_flight for member in router.members)
    await fleet.scale(1)
    assert [member.name for member in router.members] == ["r0"] and made[3].stops == made[1].stops == 1
    made[0].replicas[0].go_on.set()
    assert {len((await answer).output_ids) for answer in answers} == {10}
    assert router.resent > 0

    # A number that is free again is used again, for a new replica.
    await fleet.scale(2)
    await until(lambda: len(router.members.serving) == 2)
    assert router.members[1].name == "r1" and router.members[1].weight_version == "7"


async def test_what_does_not_serve_leaves_first(fleet_of: Callable[..., tuple[Router, Fleet]]) -> None:
    first, second = FakeSource("a"), FakeSource("b")
    router, fleet = fleet_of(first, second, make_source=lambda number: FakeSource(f"new{number}"), probe_every_s=5.0)
    await fleet.start()
    await router.members.fence(router.members[0], "gone")
    await fleet.scale(1)
    assert [member.name for member in router.members] == ["b"] and router.members[0].serves


async def test_replicas_of_given_urls_are_not_scaled(fleet_of: Callable[..., tuple[Router, Fleet]]) -> None:
    _, fleet = fleet_of(FakeSource("a"))
    await fleet.start()
    with pytest.raises(Conflict, match="by their URLs"):
        await fleet.scale(2)


async def test_a_replica_that_hangs_in_an_update_does_not_hold_up_its_leaving(
    fleet_of: Callable[..., tuple[Router, Fleet]], tmp_path: Path
) -> None:
    first, second = FakeSource("a"), FakeSource("b")
    router, fleet = fleet_of(first, second, make_source=FakeSource)
    await fleet.start()
    second.replicas[0].stopped = True
    update = asyncio.create_task(router.weights.update(FolderWeights(tmp_path), "3"))
    await until(router.weights.changing.locked)
    await asyncio.wait_for(fleet.scale(1), 10)
    assert (await asyncio.wait_for(update, 10)).version == "3"
    assert [member.name for member in router.members] == ["a"] and router.weights.version == "3"


async def test_a_replica_that_failed_for_good_leaves_before_one_that_is_started_again(
    fleet_of: Callable[..., tuple[Router, Fleet]],
) -> None:
    first, second = FakeSource("a"), FakeSource("b")
    router, fleet = fleet_of(first, second, make_source=FakeSource, probe_every_s=5.0)
    await fleet.start()
    router.members[0].state = "failed"
    await router.members.fence(router.members[1], "gone")
    await fleet.scale(1)
    assert [member.name for member in router.members] == ["b"]


async def test_a_replica_that_joins_while_memory_is_released_releases_it_too(
    fleet_of: Callable[..., tuple[Router, Fleet]],
) -> None:
    made: list[FakeSource] = []

    def make(number: int) -> FakeSource:
        made.append(FakeSource(f"r{number}"))
        return made[-1]

    router, fleet = fleet_of(FakeSource("a"), FakeSource("b"), make_source=make)
    await fleet.start()
    await router.pause("wait")
    await asyncio.gather(router.memory("release", None), fleet.scale(3))
    await until(lambda: len(router.members.serving) == 3)
    assert [call for call in made[0].replicas[0].calls if call.startswith("release")] != []
    await router.memory("resume", None)
    await router.resume()
    assert made[0].replicas[0].calls[-1] == "resume"
