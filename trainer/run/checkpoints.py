"""When a run saves checkpoints, what they hold beside the tensors, and which are kept."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from agentloop.config import CheckpointConfig
from agentloop.errors import DiskError
from agentloop.files import write_atomic
from trainer.checkpoint_files import GROUPS_FILE
from trainer.rollouts.group_file import encode_groups
from trainer.rollouts.producer import Group
from trainer.run.rundir import RunDir
from trainer.workers.group import WorkerGroup


class Checkpoints:
    """The checkpoints of one run. At most one is being written at a time.

    Args:
        warn: called when a checkpoint could not be written. The run continues and older checkpoints
            stay.
    """

    def __init__(
        self, workers: WorkerGroup, run_dir: RunDir, config: CheckpointConfig, warn: Callable[[str], None]
    ) -> None:
        self._workers = workers
        self._dir = run_dir
        self._config = config
        self._warn = warn
        self._writing: int | None = None
        self._numbers = itertools.count()

    def due(self, step: int, total_steps: int) -> bool:
        """Return whether to save after this step; the last one is always saved."""
        every = self._config.every
        return step == total_steps or (every is not None and step % every == 0)

    async def save(self, state: dict[str, Any], groups: Sequence[Group], *, wait: bool = False) -> None:
        """Save the present state. Without `wait` it is written while the next step runs.

        Args:
            state: `step`, `version` and everything else that a resumed run needs.
            groups: finished groups that are not trained yet.
            wait: return when it is written, because no later call will wait for it.

        Raises:
            WorkerError, DiskError: with `wait`, it could not be written.
        """
        await self.settle()
        step = int(state["step"])

        files = {}
        if encoded := await asyncio.to_thread(encode_groups, groups):
            # A unique name: Ctrl-C may have cancelled the wait for an earlier save but not the save
            # itself.
            path = self._dir.checkpoints / f".step_{step}.groups.{next(self._numbers)}"
            try:
                write_atomic(path, encoded)
            except DiskError as exc:
                if wait:
                    raise
                self._failed(step, exc.message)
                return
            files[GROUPS_FILE] = path

        folder = self._dir.checkpoint_of(step)
        if wait:
            await self._workers.save(folder, state, files=files)
            self._dir.prune_checkpoints(self._config)
            return
        self._writing = step
        await self._workers.save(folder, state, files=files, wait=False)
        if not self._config.asynchronous:
            await self.settle()

    async def look(self) -> None:
        """Check whether the checkpoint being written is complete, without waiting."""
        if self._writing is not None:
            self._note(*await self._workers.saved(wait=False))

    async def settle(self) -> None:
        """Wait for the checkpoint being written."""
        if self._writing is not None:
            self._note(*await self._workers.saved(wait=True))

    def _note(self, done: bool, error: str) -> None:
        if not done:
            return
        step, self._writing = self._writing, None
        if error:
            self._failed(step, error)
        else:
            self._dir.prune_checkpoints(self._config)

    def _failed(self, step: int | None, error: str) -> None:
        self._warn(f"the checkpoint of step {step} could not be written: {error}; the run continues, older ones stay")
