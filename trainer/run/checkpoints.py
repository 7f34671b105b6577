"""When a run saves checkpoints, what they hold beside the tensors, and which are kept; and the
checkpoint of another run whose adapters a run trains further (`trainer.lora.adapters`)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from agentloop.commands.runs import found_runs
from agentloop.config import CheckpointConfig, LoraConfig
from agentloop.errors import DiskError, RunDirError
from agentloop.files import real_path, write_atomic
from agentloop.model_folder import ModelFolder
from agentloop.model_folder.hub import may_be_hub_id
from trainer.checkpoint_files import GROUPS_FILE, TENSORS, verify
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


def find_adapters(lora: LoraConfig | None, model_path: str) -> Path | None:
    """Return the checkpoint whose adapters a run starts from; None: it starts with new ones.

    Args:
        lora: adapters of the run that starts.
        model_path: the local folder of its model.

    Raises:
        RunDirError: there is no checkpoint; it is damaged; or its run trained no adapters, others
            than `lora` describes, or on another model.
    """
    if lora is None or lora.adapters is None:
        return None
    given = real_path(lora.adapters)
    alone = (given / TENSORS).is_dir()
    run = RunDir(given.parent.parent if alone else given)
    folders = [given] if alone else run.checkpoint_folders()
    if not folders:
        raise RunDirError(
            f"trainer.lora.adapters: {given} has no checkpoint",
            found_runs("name a run with a finished checkpoint, or a folder checkpoints/step_N in one", beside=given),
        )
    verify(folders[-1])
    _check_config(run, lora, model_path)
    return folders[-1]


def _check_config(run: RunDir, lora: LoraConfig, model_path: str) -> None:
    """Refuse adapters of another shape or scale, or of another model.

    The shapes alone would not show it: alpha is not in a checkpoint, and two models of one
    architecture have the same shapes.
    """
    config = run.read_config()
    if config is None:
        raise RunDirError(
            f"trainer.lora.adapters: {run.config_file} is missing or damaged, without which nothing says whether the "
            "adapters fit",
            "name the run directory as the run wrote it, or a checkpoint inside of it",
        )
    trained: dict[str, Any] = (config.get("trainer") or config).get("lora") or {}
    if not trained:
        raise RunDirError(
            f"trainer.lora.adapters: the run {run.root} trained no adapters",
            f"start from its finished model instead: {_how_to_start(run, config)}, and trainer.lora.adapters=null",
        )

    trained = LoraConfig().plain() | trained  # an earlier version may have had fewer keys
    for key, wanted in lora.plain().items():
        if key != "adapters" and trained[key] != wanted:
            raise RunDirError(
                f"trainer.lora.adapters: trainer.lora.{key} is {wanted}, and the adapters of {run.root} were trained "
                f"with {trained[key]}",
                f"set trainer.lora.{key}={trained[key]}; or train new ones on the model with these merged into it: "
                f"{_how_to_start(run, config)}, and trainer.lora.adapters=null",
            )

    base = (config.get("model") or {}).get("path")
    if base is not None and _is_another_model(str(base), Path(model_path)):
        raise RunDirError(
            f"trainer.lora.adapters: the adapters of {run.root} belong to model.path={base}, and this run's model is "
            f"{model_path}",
            f"set model.path={base}",
        )


def _how_to_start(run: RunDir, config: dict[str, Any]) -> str:
    """Return how a run starts from the model of another: with the folder that fine-tuning wrote at
    its end, or with an exported one."""
    finished = Path(config.get("out") or run.root / "model")
    if "stages" in config and ModelFolder(finished).has_config:
        return f"model.path={finished}"
    return f"agentloop export {run.root} --out <folder>, model.path=<folder>"


def _is_another_model(base: str, model: Path) -> bool:
    """Whether `base`, a folder or hub id, is another model than that of a folder, as far as names
    tell: a folder may be a copy of a hub's model."""
    if Path(base).is_dir():
        return real_path(Path(base)) != real_path(model)
    # The cache of the hub: models--owner--name/snapshots/<revision>.
    cached = [part.removeprefix("models--") for part in model.parts if part.startswith("models--")]
    return bool(cached) and may_be_hub_id(base) and cached[-1].lower() != base.replace("/", "--").lower()
