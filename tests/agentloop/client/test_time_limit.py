"""Time limits whose clock stands still; on a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from agentloop.client.time_limit import TimeLimit, not_counted, place_in
from tests.virtual_time import run_virtually

Block = Callable[[], Awaitable[object]]


async def lasted(seconds: float | None, block: Block) -> tuple[float, bool]:
    """Return how long a block ran under a limit, and whether the limit ended it."""
    clock = asyncio.get_running_loop().time
    begin = clock()
    limit = TimeLimit(seconds)
    try:
        async with limit:
            await block()
    except TimeoutError:
        assert limit.expired()
        return clock() - begin, True
    assert not limit.expired()
    return clock() - begin, False


async def waits(seconds: float, counted: float = 0.0) -> None:
    with not_counted() as wait:
        await asyncio.sleep(seconds)
        wait.count(counted)


def test_it_limits_what_is_not_a_wait() -> None:
    assert run_virtually(lasted(2.0, lambda: asyncio.sleep(5))) == (2.0, True)
    assert run_virtually(lasted(None, lambda: asyncio.sleep(5))) == (5.0, False)


def test_a_wait_is_not_counted_and_the_clock_goes_on_after_it() -> None:
    async def block() -> None:
        await asyncio.sleep(1)
        await waits(100)
        await asyncio.sleep(5)

    assert run_virtually(lasted(2.0, block)) == (102.0, True)
    assert run_virtually(lasted(6.5, block)) == (106.0, False)


def test_a_part_of_a_wait_may_be_counted() -> None:
    async def block() -> None:
        await waits(100, counted=1.5)
        await asyncio.sleep(1)

    assert run_virtually(lasted(2.0, block)) == (100.5, True)
    assert run_virtually(lasted(3.0, block)) == (101.0, False)
    assert run_virtually(lasted(1.0, block)) == (100.0, True), "nothing was left"


def test_waits_at_the_same_time_are_one() -> None:
    async def block() -> None:
        await asyncio.gather(waits(10, counted=0.5), waits(20, counted=1.0), waits(5, counted=0.7))
        await asyncio.sleep(9)

    assert run_virtually(lasted(3.0, block)) == (22.0, True)


def test_limits_nest() -> None:
    async def inner() -> None:
        assert await lasted(1.0, lambda: waits(50)) == (50.0, False)
        assert await lasted(1.0, lambda: asyncio.sleep(9)) == (1.0, True)
        await asyncio.sleep(9)

    assert run_virtually(lasted(3.0, inner)) == (53.0, True)


def test_a_wait_outside_of_a_limit_or_after_its_end_does_nothing() -> None:
    async def main() -> None:
        await waits(1)
        async with TimeLimit(5):
            left_behind = asyncio.create_task(waits(2))
            late = asyncio.create_task(asyncio.sleep(1))
        await late
        await left_behind

    run_virtually(main())


def test_a_cancelled_wait_is_a_cancellation() -> None:
    async def main() -> None:
        task = asyncio.create_task(lasted(1.0, lambda: waits(50)))
        await asyncio.sleep(5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_virtually(main())


def test_the_wait_for_a_place_is_not_counted() -> None:
    semaphore = asyncio.Semaphore(1)

    async def work() -> None:
        async with place_in(semaphore):
            await asyncio.sleep(1)

    async def main() -> list[tuple[float, bool]]:
        return await asyncio.gather(*[lasted(1.5, work) for _ in range(4)])

    assert run_virtually(main()) == [(1.0, False), (2.0, False), (3.0, False), (4.0, False)]
    assert semaphore._value == 1
