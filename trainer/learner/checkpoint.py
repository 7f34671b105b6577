"""Checkpoints: copied to CPU memory, written while training continues, then renamed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from agentloop.errors import AgentloopError, RunDirError
from agentloop.files import disk_error, disk_errors, free_space, partial_of, rename_folder
from trainer.checkpoint_files import TENSORS, seal
from trainer.learner.critic import Critic
from trainer.learner.model.lora import is_adapter
from trainer.learner.model.policy import PolicyModel


class CheckpointSaver:
    """One rank's side of saving. One save at a time; all ranks call the methods together.

    `begin` copies the state to CPU memory and returns; a thread writes the files while training
    continues. The thread's collectives use their own process group, because training uses the
    default one at the same time.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[str] | None = None

    def begin(
        self,
        folder: Path,
        model: PolicyModel,
        optimizer: torch.optim.Optimizer,
        steps: int,
        state: dict[str, Any],
        critic: Critic | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Start to write `folder/trainer/`, `files` and `folder/state.json`.

        Args:
            files: name in the folder -> path of a file that is moved there.
        """
        assert self._writing is None or self._writing.done(), "one save at a time"
        if self._group is None:
            self._group = dist.new_group(backend="gloo")

        # The barrier keeps other ranks from writing into a leftover folder before rank 0 has
        # removed it.
        partial = partial_of(folder)
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()

        tensors = async_save(
            _state_dict(model, optimizer, steps, critic), checkpoint_id=partial / TENSORS, process_group=self._group
        )
        assert isinstance(tensors, Future), "without an async stager a Future is returned"
        self._writing = self._thread.submit(_finish, tensors, partial, folder, state, dict(files or {}))

    def finish(self, *, wait: bool) -> dict[str, Any]:
        """Return the state of the latest save.

        Args:
            wait: block until it has ended.

        Returns:
            `done`, and `error`: why this rank's part failed, or an empty string.
        """
        if self._writing is None:
            return {"done": True, "error": ""}
        if not wait and not self._writing.done():
            return {"done": False, "error": ""}
        return {"done": True, "error": self._writing.result()}


def _finish(tensors: Future[Any], partial: Path, folder: Path, state: dict[str, Any], files: dict[str, str]) -> str:
    """Wait for the tensors; rank 0 adds the files and renames the folder. Return the error."""
    try:
        tensors.result()  # on rank 0: returns once all ranks have written their files
        if dist.get_rank() == 0:
            for name, path in files.items():
                shutil.move(path, partial / name)
            with disk_errors(partial):
                seal(partial, state)
                rename_folder(partial, folder)
    except (OSError, RuntimeError, AgentloopError, CheckpointException) as exc:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        return _one_line(exc, partial)
    return ""


_WRITE_MARKS = ("inline_container", "PytorchStreamWriter")
"""Parts of the text of torch's errors when it cannot write a file."""


def _one_line(exc: BaseException, folder: Path) -> str:
    """Describe a failure by its cause: the text of a `CheckpointException` is a traceback."""
    while isinstance(exc, CheckpointException) and exc.failures:
        exc = next(iter(exc.failures.values()))[0]
    if isinstance(exc, OSError) and (error := disk_error(exc, Path(exc.filename or folder))) is not None:
        exc = error
    if isinstance(exc, AgentloopError):
        return exc.message
    lines = str(exc).strip().splitlines()
    line = f"{type(exc).__name__}: {lines[0][:300]}" if lines else type(exc).__name__
    if any(mark in line for mark in _WRITE_MARKS):
        # torch hides the error number of a write; most often the disk is full.
        return f"a file in {folder} could not be written{free_space(folder)}: {line}"
    return line


@contextlib.contextmanager
def reading(folder: Path, kind: type[BaseException] = CheckpointException) -> Iterator[None]:
    """Name the folder if torch cannot read it within the block.

    Args:
        kind: what torch raises then. For tensors a `CheckpointException`, which is not an
            `Exception`: other errors are those of the connection to a rank that died. For
            `.metadata`, which is unpickled, any `Exception`.

    Raises:
        RunDirError: instead of `kind`.
    """
    try:
        yield
    except kind as exc:
        raise RunDirError(
            f"the checkpoint {folder} cannot be read: {_one_line(exc, folder)}",
            f"move {folder.parent} away, and --resume continues from the checkpoint before",
        ) from exc


def load_checkpoint(
    folder: Path, model: PolicyModel, optimizer: torch.optim.Optimizer, critic: Critic | None = None
) -> int:
    """Restore model, optimizer, critic and random state; return the optimizer steps taken.

    The number of ranks may differ from that of the run that saved; random state is not restored
    then.

    Raises:
        RunDirError: the folder is not a checkpoint of this model, or has no critic although this
            run has one.
    """
    state = _state_dict(model, optimizer, 0, critic)
    saved = _saved_keys(folder, state["model"])
    if critic is not None and "critic_steps" not in saved:
        raise RunDirError(
            f"{folder} has no critic", "a run cannot switch to advantage=gae when it resumes: start a new run"
        )

    own = f"rng.{dist.get_rank()}"
    ranks = sum(key.startswith("rng.") for key in saved)
    if ranks != dist.get_world_size():
        del state[own]

    with reading(folder):
        load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=_READ,
    )
    if critic is not None:
        critic.restore(state["critic_model"], state["critic_optimizer"], int(state["critic_steps"].item()))
    if own in state:
        torch.set_rng_state(state[own])

    return int(state["steps"].item())


def load_model(folder: Path, model: PolicyModel) -> None:
    """Read only the weights of a `trainer/` folder.

    Raises:
        RunDirError: the folder is not a checkpoint of this model.
    """
    state = _saved_part(get_model_state_dict(model))
    _saved_keys(folder, state)
    with reading(folder):
        load({"model": state}, checkpoint_id=folder)
    set_model_state_dict(model, state, options=_READ)


def _saved_part(model_state: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a model's state to save: with adapters, only those."""
    return {key: tensor for key, tensor in model_state.items() if is_adapter(key)} or model_state


_READ = StateDictOptions(strict=False)
"""Options for a partial state: adapters only. `_saved_keys` checks for missing keys."""


def _saved_keys(folder: Path, model_state: dict[str, Any]) -> set[str]:
    """Return the keys of a checkpoint.

    Raises:
        RunDirError: it is not a checkpoint of this model.
    """
    if not (folder / ".metadata").is_file():
        raise RunDirError(f"{folder} has no checkpoint", "resume from a folder checkpoints/step_N of a run")

    with reading(folder, Exception):
        entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    for key, tensor in model_state.items():
        entry = entries.get(f"model.{key}")
        if not isinstance(entry, TensorStorageMetadata) or entry.size != tensor.shape:
            fault = "is missing" if entry is None else "has another shape"
            raise RunDirError(
                f"{folder} is a checkpoint of another model: {key} {fault}",
                "set model.path to the model that the run started from",
            )
    return set(entries)


def _state_dict(
    model: PolicyModel, optimizer: torch.optim.Optimizer, steps: int, critic: Critic | None
) -> dict[str, Any]:
    model_state, optimizer_state = _model_and_optimizer(model, optimizer)
    state = {
        "model": _saved_part(model_state),
        "optimizer": optimizer_state,
        "steps": torch.tensor(steps),
        f"rng.{dist.get_rank()}": torch.get_rng_state(),
    }
    if critic is not None:
        state["critic_model"], state["critic_optimizer"] = _model_and_optimizer(critic.model, critic.optimizer)
        state["critic_steps"] = torch.tensor(critic.steps)
    return state


def _model_and_optimizer(model: PolicyModel, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    fresh = not optimizer.state
    model_state, optimizer_state = get_state_dict(model, optimizer)
    if fresh:  # torch has created the state by a step that changes only this counter
        for entry in optimizer.state.values():
            entry["step"].zero_()
    return model_state, optimizer_state
