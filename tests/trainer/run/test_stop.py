"""Signals that end a run: the first one where no work is lost, the second at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from trainer.run.stop import StopRequest, on_stop_signals

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@pytest.fixture
def heard() -> Iterator[None]:
    """The signals as in a terminal: a suite that was started in the background, or by nohup, ignores some."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ALL}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ALL)
async def test_each_signal_stops_a_run_where_no_work_is_lost(number: signal.Signals, heard: None) -> None:
    busy, said = True, []
    stop = StopRequest(lambda: busy, said.append)
    with stop.on_signals():
        os.kill(os.getpid(), number)
        await asyncio.sleep(0.01)
        assert stop.requested and not stop.insisted and len(said) == 1
        os.kill(os.getpid(), number)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(10)
        assert stop.insisted
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()


async def test_what_nohup_ignores_stays_ignored() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_stop_signals(lambda: heard.append(1)):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.01)
        assert heard == [1]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
