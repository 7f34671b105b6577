"""Write the traces of a run while the next step runs, and name them to what sends spans."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from agentloop.config import TraceConfig
from agentloop.errors import TraceError
from agentloop.trace.index import TraceIndex
from agentloop.trace.record import Split, TraceRecord
from agentloop.trace.sender import SpanSender
from agentloop.trace.store import TraceStore, Written


class RunTraces:
    """The traces of one run. At most one is being written at a time, in a thread.

    Args:
        seed: decides which groups of a step are kept when `trace.max_bytes_per_step` has no room
            for all.
        total_steps: the first and the last step are always written.
        notice: called once with what was left out.
        sender: sends what is in the files, and adds them to the index; None: nothing is sent.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TraceConfig,
        *,
        seed: int,
        total_steps: int,
        notice: Callable[[str], None],
        sender: SpanSender | None = None,
    ) -> None:
        self._store = TraceStore(run_dir)
        self._index = TraceIndex(run_dir, temporary=False)
        self._config = config
        self._sender = sender
        self._seed = seed
        self._total_steps = total_steps
        self._notice = notice
        self._said = False
        self._writing: asyncio.Task[Written] | None = None
        self._resuming: asyncio.Task[None] | None = None

    def resume(self) -> None:
        """Name the steps that are there to what sends them: the run may have been killed before
        all were sent. Does not wait; called after the rewind."""
        if self._sender is not None and self._sender.active:
            self._resuming = asyncio.create_task(asyncio.to_thread(self._name_all), name="traces that are there")

    def due(self, step: int) -> bool:
        """Whether the trace of a training step is written."""
        return step in (1, self._total_steps) or step % self._config.train_every == 0

    async def write(self, step: int, split: Split, records: Sequence[TraceRecord]) -> None:
        """Begin to write the trace of a step, after the one before it is written.

        Raises:
            DiskError: the one before it could not be written.
        """
        await self.settle()
        self._writing = asyncio.create_task(self._write(step, split, records), name=f"trace of step {step}")

    async def settle(self) -> None:
        """Wait for the trace that is being written.

        Raises:
            DiskError: the disk is full or broken.
        """
        while (writing := self._writing) is not None:
            try:
                # A thread cannot be stopped: after Ctrl-C, `close` waits for it.
                self._say(await asyncio.shield(writing))
            finally:
                if writing.done() and self._writing is writing:  # else a background evaluation began one
                    self._writing = None
        if self._sender is not None:
            self._sender.report()

    def _say(self, written: Written) -> None:
        if written.left_out_groups and not self._said:
            self._said = True
            self._notice(
                f"{written.path} leaves out {written.left_out_groups:,} groups ({written.left_out_episodes:,} "
                f"episodes): trace.max_bytes_per_step is {self._config.max_bytes_per_step:,}. Failed and rejected "
                "episodes are kept, and metrics count all. Later steps leave out others without a notice"
            )

    async def close(self) -> None:
        """Wait for the trace that is being written; its failure is no longer reported."""
        while (writing := self._writing) is not None:
            await asyncio.gather(writing, return_exceptions=True)
            if self._writing is writing:
                self._writing = None
        if self._resuming is not None:
            await asyncio.gather(self._resuming, return_exceptions=True)
        self._index.close()

    def _name_all(self) -> None:
        assert self._sender is not None
        for file in self._store.files():
            if not file.old:  # those of earlier versions hold no spans
                self._sender.submit(file.step, file.split)

    async def _write(self, step: int, split: str, records: Sequence[TraceRecord]) -> Written:
        return await asyncio.to_thread(self._write_and_index, step, split, records)

    def _write_and_index(self, step: int, split: str, records: Sequence[TraceRecord]) -> Written:
        written = self._store.write(step, split, records, max_bytes=self._config.max_bytes_per_step, seed=self._seed)
        if self._sender is not None and self._sender.active:
            self._sender.submit(step, split)
            return written
        # A cache, so that a viewer opens at once: it can make it again. A viewer of another
        # version may have made the file, with other columns (sqlite3.IntegrityError).
        with suppress(TraceError, sqlite3.Error):
            self._index.add(step, split)
        return written
