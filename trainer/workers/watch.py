"""Wait for the ranks' answers with a bound: a stopped or hung rank closes no socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from agentloop.runtime.child import StoppedTime
from trainer.workers.rank import Rank, RankLost, RawAnswer

WATCH_S = 1.0
"""Interval of looks at ranks that have not answered yet."""


class RankHangs(RankLost):
    """Ranks did not answer within the time limit, or are stopped."""


async def wait_for_answers(
    ranks: Sequence[Rank], calls: Sequence[asyncio.Future[RawAnswer]], operation: str, timeout_s: float
) -> None:
    """Wait until all ranks have answered, or one has failed.

    Args:
        calls: one for each rank.
        operation: name of the command, for messages.
        timeout_s: `trainer.timeout_s`.

    Raises:
        RankHangs: ranks are stopped, or took longer than `timeout_s`.
        Exception: that of a call that failed.
    """
    pending = set(calls)
    waited_s, stopped = 0.0, {rank: StoppedTime() for rank in ranks}
    while pending:
        begin = time.monotonic()
        done, pending = await asyncio.wait(pending, timeout=WATCH_S, return_when=asyncio.FIRST_EXCEPTION)
        for call in done:
            call.result()

        # A run that is stopped as a whole, by a scheduler say, is not a hung rank.
        elapsed = min(time.monotonic() - begin, 2 * WATCH_S)
        waited_s += elapsed
        slow = [rank for rank, call in zip(ranks, calls, strict=True) if call in pending]
        for rank in slow:
            too_long = stopped[rank].look(rank.stopped, elapsed)
            if too_long or stopped[rank].seconds >= timeout_s:
                raise RankHangs(
                    f"trainer rank {rank.number} (process {rank.process.pid}) was stopped for "
                    f"{stopped[rank].seconds:.0f} s during {operation}",
                    "find out what sends SIGSTOP to it; --resume continues the run",
                )
        if slow and waited_s >= timeout_s:
            numbers = ", ".join(str(rank.number) for rank in slow)
            raise RankHangs(
                f"trainer rank{'s' * (len(slow) > 1)} {numbers} did not answer {operation} within {waited_s:.0f} s",
                f"see {slow[0].log}; raise trainer.timeout_s if the model needs longer",
            )
