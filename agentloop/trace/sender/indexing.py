"""`Indexing`: a thread of the sender process that adds trace files to their index."""

from __future__ import annotations

import contextlib
import queue
import sqlite3
import threading
from pathlib import Path

from agentloop.errors import TraceError
from agentloop.trace.index import TraceIndex


class Indexing:
    """Adds one file after the other, so that a viewer opens at once. What fails or is left at the
    end of a run does not matter: the index is a cache, which a viewer completes."""

    def __init__(self, run_dir: Path) -> None:
        self._index = TraceIndex(run_dir, temporary=False)
        self._files: queue.SimpleQueue[tuple[int, str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="trace index", daemon=True)
        self._thread.start()

    def put(self, step: int, split: str) -> None:
        """Add a trace file; never waits."""
        self._files.put((step, split))

    def finish(self) -> None:
        """End the thread when no file waits."""
        self._files.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait for the end."""
        self._thread.join(max(0.0, timeout_s))

    def _work(self) -> None:
        while (file := self._files.get()) is not None:
            # sqlite3.IntegrityError: a viewer of another version made it, with other columns.
            with contextlib.suppress(TraceError, sqlite3.Error):
                self._index.add(*file)
        self._index.close()
