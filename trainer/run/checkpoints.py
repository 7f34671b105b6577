"""When a run's checkpoints are made, what is in them beside the tensors, and which of them stay."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from agentloop.config import CheckpointConfig
from trainer.rollouts.group_file import GROUPS_FILE, encode_groups
from trainer.rollouts.producer import Group
from trainer.run.rundir import RunDir
from trainer.workers.group import WorkerGroup


class Checkpoints:
    """The checkpoints of one run. At most one is being written.

    Args:
        warn: told when one could not be written. The run goes on, and the older ones stay.
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

    async def save(self, state: dict[str, Any], groups: Sequence[Group], *, wait: bool = False) -> None:
        """Save this moment; without `wait` it is written while the next step goes on.

        Args:
            state: `step`, `version` and what else the run has to know of it.
            groups: finished, and not trained on yet.
            wait: until it is written, for nothing comes after it.

        Raises:
            WorkerError: with `wait`, when it could not be written.
        """
        await self.settle()
        step = int(state["step"])
        files = {}
        if lines := encode_groups(groups):
            # A name of its own: Ctrl-C may have cut off the waiting for a save, not the save.
            files[GROUPS_FILE] = self._dir.checkpoints / f".step_{step}.groups.{next(self._numbers)}"
            files[GROUPS_FILE].write_bytes(lines)
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
        """Note whether the one that is being written is done."""
        if self._writing is not None:
            self._note(*await self._workers.saved(wait=False))

    async def settle(self) -> None:
        """Wait for the one that is being written."""
        if self._writing is not None:
            self._note(*await self._workers.saved(wait=True))

    def _note(self, done: bool, error: str) -> None:
        if not done:
            return
        step, self._writing = self._writing, None
        if error:
            self._warn(f"the checkpoint of step {step} could not be written: {error}; older ones stay, the run goes on")
        else:
            self._dir.prune_checkpoints(self._config)
