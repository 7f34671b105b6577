"""The rate limit: a true rate, fair between episodes; on a virtual clock."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict

import pytest

from tests.virtual_time import run_virtually
from tools.http import RateLimit


def assert_rate(starts: list[float], rate: int) -> None:
    """No window of one second has more than `rate` starts."""
    for first, beyond in zip(starts, starts[rate:], strict=False):
        assert beyond - first >= 1.0 - 1e-9


def test_512_episodes_at_the_limit_are_never_above_it_and_wait_their_fair_time() -> None:
    episodes, searches, rate = 512, 4, 150
    starts: list[float] = []
    waits: dict[int, list[float]] = defaultdict(list)

    async def episode(number: int, limit: RateLimit) -> None:
        clock = asyncio.get_running_loop().time
        for turn in range(searches):
            asked = clock()
            async with limit.slot(number):
                starts.append(clock())
                waits[number].append(clock() - asked)
                await asyncio.sleep(0.05 + (number * 7 + turn) % 13 / 50)

    async def main() -> float:
        limit = RateLimit(rate, 120)
        await asyncio.gather(*[episode(number, limit) for number in range(episodes)])
        return asyncio.get_running_loop().time()

    took = run_virtually(main())
    assert len(starts) == episodes * searches
    assert_rate(starts, rate)
    fair = episodes / rate
    assert max(wait for found in waits.values() for wait in found) <= 2 * fair
    assert max(map(sum, waits.values())) <= 2 * searches * fair
    assert took < 1.1 * episodes * searches / rate + 1  # the limit is also used


def test_an_episode_with_a_thousand_requests_delays_the_others_by_one() -> None:
    waits = []

    async def one(limit: RateLimit, caller: int) -> None:
        begin = asyncio.get_running_loop().time()
        async with limit.slot(caller):
            if caller:
                waits.append(asyncio.get_running_loop().time() - begin)

    async def main() -> None:
        limit = RateLimit(10, 5)
        greedy = [asyncio.create_task(one(limit, 0)) for _ in range(1000)]
        await asyncio.sleep(0.001)
        await asyncio.gather(*[one(limit, caller) for caller in range(1, 21)])
        for task in greedy:
            task.cancel()

    run_virtually(main())
    assert max(waits) <= 2 * 21 / 10 + 1


@pytest.mark.parametrize("rate", [0.5, 1, 3, 150, 2000])
def test_the_rate_holds_from_the_first_request_on(rate: float) -> None:
    starts: list[float] = []

    async def one(limit: RateLimit, caller: int) -> None:
        async with limit.slot(caller):
            starts.append(asyncio.get_running_loop().time())

    async def main() -> None:
        limit = RateLimit(rate, 10**6)
        await asyncio.sleep(100)  # a bucket does not fill up beyond its size
        await asyncio.gather(*[one(limit, caller) for caller in range(max(4, int(rate * 3)))])

    run_virtually(main())
    if rate < 1:
        assert all(after - before >= 1 / rate - 1e-9 for before, after in itertools.pairwise(starts))
    else:
        assert_rate(starts, int(rate))


def test_no_more_requests_are_in_flight_than_allowed() -> None:
    most = 0

    async def one(limit: RateLimit, caller: int) -> None:
        nonlocal most
        async with limit.slot(caller):
            most = max(most, limit.in_flight)
            await asyncio.sleep(1)

    async def main() -> None:
        limit = RateLimit(None, 7)
        await asyncio.gather(*[one(limit, caller) for caller in range(40)])
        assert limit.in_flight == 0

    run_virtually(main())
    assert most == 7


def test_a_cancelled_request_gives_its_turn_back() -> None:
    async def hold(limit: RateLimit, caller: int, seconds: float) -> None:
        async with limit.slot(caller):
            await asyncio.sleep(seconds)

    async def main() -> None:
        limit = RateLimit(100, 1)
        first = asyncio.create_task(hold(limit, 1, 5))
        await asyncio.sleep(0)
        second, third = (asyncio.create_task(hold(limit, caller, 1)) for caller in (2, 3))
        await asyncio.sleep(1)
        second.cancel()  # while it waits
        first.cancel()
        await asyncio.sleep(0)
        third_started = third
        await third_started
        # Cancelled in the moment in which its turn has come.
        holder = asyncio.create_task(hold(limit, 1, 5))
        await asyncio.sleep(0.5)
        late = asyncio.create_task(hold(limit, 2, 1))
        await asyncio.sleep(0)
        holder.cancel()
        await asyncio.sleep(0)
        late.cancel()
        await asyncio.gather(holder, late, first, second, return_exceptions=True)
        assert limit.in_flight == 0
        await hold(limit, 4, 0)

    run_virtually(main())


def test_two_limits_do_not_know_each_other() -> None:
    async def main() -> float:
        limits = [RateLimit(1, 1), RateLimit(1000, 1)]
        for limit in limits:
            async with limit.slot(0):
                pass
        for _ in range(10):
            async with limits[1].slot(0):
                pass
        return asyncio.get_running_loop().time()

    assert run_virtually(main()) < 0.1


def test_a_limit_serves_the_next_event_loop_too() -> None:
    limit = RateLimit(1, 1)

    async def main() -> None:
        async with limit.slot(0):
            pass
        waiting = asyncio.create_task(limit._acquire(0))
        await asyncio.sleep(0)
        waiting.cancel()

    run_virtually(main())
    run_virtually(main())
