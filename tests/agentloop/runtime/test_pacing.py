"""Episodes that are ready together take turns, so that the event loop polls in between."""

from __future__ import annotations

import asyncio

import pytest

from agentloop.runtime.event_loop import run_loops
from agentloop.runtime.pacing import Pacer


class Clock:
    """A clock that only work advances."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def worked(pacer: Pacer, clock: Clock, jobs: list[float]) -> tuple[list[int], list[float]]:
    """Run jobs of the given seconds at once; return the order of their ends and the times between polls."""
    order: list[int] = []
    gaps: list[float] = []

    async def job(number: int, seconds: float) -> None:
        await pacer.turn()
        clock.now += seconds
        order.append(number)

    async def main() -> None:
        tasks = [asyncio.create_task(job(number, seconds)) for number, seconds in enumerate(jobs)]
        while not all(task.done() for task in tasks):
            before = clock.now
            await asyncio.sleep(0)
            gaps.append(clock.now - before)

    run_loops(main())
    return order, gaps


@pytest.mark.parametrize("seconds", [0.0002, 0.001, 0.004, 0.05])
def test_the_loop_is_held_up_for_about_a_slice(seconds: float) -> None:
    clock = Clock()
    order, gaps = worked(Pacer(0.01, clock), clock, [seconds] * 600)
    assert order == list(range(600))
    assert max(gaps) <= 0.02 + seconds
    assert len(gaps) < 60 + 2 * 600 * seconds / min(0.01, max(seconds, 0.005))  # and it does not look at each


def test_costs_that_change_are_followed() -> None:
    clock = Clock()
    order, gaps = worked(Pacer(0.01, clock), clock, [0.0001] * 2000 + [0.002] * 200)
    assert order == list(range(2200))
    # Where the dear ones begin, a batch as for cheap ones is let through once, and a half of it the next time.
    assert len([gap for gap in gaps if gap > 0.02]) <= 5


def test_few_do_not_wait() -> None:
    clock = Clock()
    pacer = Pacer(0.01, clock)

    async def main() -> None:
        for _ in range(5):
            for _ in range(3):
                turn = pacer.turn()
                with pytest.raises(StopIteration):  # it does not even suspend
                    turn.send(None)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    run_loops(main())


def test_who_was_cancelled_takes_no_turn() -> None:
    clock = Clock()
    pacer = Pacer(0.01, clock)
    done: list[int] = []

    async def job(number: int) -> None:
        await pacer.turn()
        clock.now += 0.02
        done.append(number)

    async def main() -> None:
        tasks = [asyncio.create_task(job(number)) for number in range(10)]
        await asyncio.sleep(0)
        for task in tasks[2:8]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run_loops(main())
    assert done == [0, 1, 8, 9]


def test_it_serves_one_loop_after_the_other() -> None:
    clock = Clock()
    pacer = Pacer(0.01, clock)

    async def cut_short() -> None:
        await pacer.turn()
        clock.now += 1
        left.append(asyncio.ensure_future(pacer.turn()))

    left: list[asyncio.Future[None]] = []
    asyncio.run(cut_short())
    assert worked(pacer, clock, [0.001] * 50)[0] == list(range(50))
