"""Ctrl-C and other signals that end a program: stop a run where no work is lost, or at once."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

ALWAYS = (signal.SIGINT, signal.SIGTERM)

UNLESS_IGNORED = (signal.SIGHUP, signal.SIGQUIT)
"""A closed terminal and Ctrl-\\. `nohup` ignores the first, and a run started with it goes on."""


@contextlib.contextmanager
def on_stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` in the running event loop at each of the signals, within the block."""
    loop = asyncio.get_running_loop()
    numbers = [*ALWAYS, *(number for number in UNLESS_IGNORED if signal.getsignal(number) is not signal.SIG_IGN)]
    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


class StopRequest:
    """A user's request to stop the run, made by a signal.

    The first signal cancels the run's task, unless the step must be finished first. Then
    `requested` is set, and the loop stops after the step; a second signal cancels at once.

    Args:
        must_finish_step: whether stopping now would lose or tear a step.
        notice: called with a line for the user.

    Attributes:
        requested: whether a signal has arrived.
        insisted: whether a second one has arrived: wait for nothing any more.
    """

    def __init__(self, must_finish_step: Callable[[], bool], notice: Callable[[str], None]) -> None:
        self._must_finish_step = must_finish_step
        self._notice = notice
        self.requested = False
        self.insisted = False

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Listen for signals within the block; they stop the current task."""
        task = asyncio.current_task()
        assert task is not None

        def on_signal() -> None:
            self.insisted, self.requested = self.requested, True
            if self.insisted or not self._must_finish_step():
                task.cancel()
            else:
                self._notice("stopping after this step; press Ctrl-C again to stop immediately (and lose this step)")

        with on_stop_signals(on_signal):
            yield
