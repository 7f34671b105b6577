"""Start the processes of a group of ranks, and let those of several machines meet."""

from __future__ import annotations

import asyncio
from pathlib import Path

from agentloop.config import TrainerConfig
from agentloop.launch.base import Launcher
from trainer.rank_commands import OPEN_MEETING
from trainer.workers.rank import Rank
from trainer.workers.watch import wait_for_answers


async def spawn_ranks(ranks: list[Rank], config: TrainerConfig, log_dir: Path, launcher: Launcher) -> None:
    """Start the processes.

    Args:
        ranks: gets each that was started, also if another fails.
        log_dir: gets `trainer_rank{r}.log`.

    Raises:
        WorkerError: one did not connect.
    """

    async def spawn(number: int) -> Rank:
        log = log_dir / f"trainer_rank{number}.log"
        return await Rank.spawn(number, threads=config.threads, log=log, launcher=launcher)

    if launcher.local:
        for number in range(config.ranks):
            ranks.append(await spawn(number))
        return
    # Elsewhere a start lasts until the process has connected.
    results = await asyncio.gather(*map(spawn, range(config.ranks)), return_exceptions=True)
    ranks += [result for result in results if isinstance(result, Rank)]
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def open_meeting(rank: Rank, timeout_s: float) -> tuple[str, int]:
    """Let rank 0 open the store at which all meet; return its host and port.

    Raises:
        WorkerError: it died, or did not answer in time.
    """
    call = asyncio.ensure_future(rank.call(OPEN_MEETING))
    await wait_for_answers([rank], [call], "OpenMeeting", timeout_s)
    host, port = call.result()[0]
    return host, port
