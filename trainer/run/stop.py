"""Ctrl-C and SIGTERM: stop a run where no work is lost, or at once."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A user's request to stop the run, made by SIGINT or SIGTERM.

    The first signal cancels the run's task, unless the step must be finished first. Then
    `requested` is set, and the loop stops after the step; a second signal cancels at once.

    Args:
        must_finish_step: whether stopping now would lose or tear a step.
        notice: called with a line for the user.

    Attributes:
        requested: whether a signal has arrived.
    """

    def __init__(self, must_finish_step: Callable[[], bool], notice: Callable[[str], None]) -> None:
        self._must_finish_step = must_finish_step
        self._notice = notice
        self.requested = False

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Listen for signals within the block; they stop the current task."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, task)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _on_signal(self, task: asyncio.Task[Any]) -> None:
        again, self.requested = self.requested, True
        if again or not self._must_finish_step():
            task.cancel()
        else:
            self._notice("stopping after this step; press Ctrl-C again to stop immediately (and lose this step)")
