"""Checkpoints: copied to memory at once, written whole under a temporary name while training goes on, then renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from agentloop.errors import RunDirError
from agentloop.files import partial_of, rename_folder, write_atomic
from trainer.learner.critic import Critic
from trainer.learner.model.lora import is_adapter
from trainer.learner.model.policy import PolicyModel

STATE_FILE = "state.json"
"""What the run adds to a checkpoint; written last, so that a folder with it is whole."""

TENSORS = "trainer"
"""The folder of a checkpoint that holds model, optimizer and random state."""


class CheckpointSaver:
    """One rank's side of saving. One save at a time; all ranks call the methods together.

    `begin` copies the state to CPU memory and returns; the files are written by a thread while training goes on. The
    thread's collectives have a process group of their own, because the ranks use the default one meanwhile.
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
        """Start to write `folder/trainer/` (torch.distributed.checkpoint), `files` and `folder/state.json`.

        Args:
            files: name in the folder, and path of a file that is moved there.
        """
        assert self._writing is None or self._writing.done(), "one save at a time"
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        partial = partial_of(folder)
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        tensors = dcp.async_save(
            _state_dict(model, optimizer, steps, critic), checkpoint_id=partial / TENSORS, process_group=self._group
        )
        self._writing = self._thread.submit(_finish, tensors, partial, folder, state, dict(files or {}))

    def finish(self, *, wait: bool) -> dict[str, Any]:
        """How the save stands that was begun last.

        Args:
            wait: until it has ended.

        Returns:
            `done`, and `error`: why this rank's part of it failed, an empty text when it did not.
        """
        if self._writing is None:
            return {"done": True, "error": ""}
        if not wait and not self._writing.done():
            return {"done": False, "error": ""}
        return {"done": True, "error": self._writing.result()}


def _finish(tensors: Future[Any], partial: Path, folder: Path, state: dict[str, Any], files: dict[str, str]) -> str:
    """Wait for the tensors' files; rank 0 adds the others and gives the folder its name. Returns what went wrong."""
    try:
        tensors.result()  # on rank 0: all ranks have written theirs
        if dist.get_rank() == 0:
            for name, path in files.items():
                shutil.move(path, partial / name)
            write_atomic(partial / STATE_FILE, json.dumps(state).encode())
            rename_folder(partial, folder)
    except (OSError, RuntimeError, CheckpointException) as exc:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        return f"{type(exc).__name__}: {exc}".strip()
    return ""


def load_checkpoint(
    folder: Path, model: PolicyModel, optimizer: torch.optim.Optimizer, critic: Critic | None = None
) -> int:
    """Read a `trainer/` folder into model, optimizer, critic and random state; returns the optimizer steps taken.

    The number of ranks may differ from that of the run that saved; random state is then left as it is.

    Raises:
        RunDirError: the folder holds no checkpoint of this model, or none of the critic that this run has.
    """
    state = _state_dict(model, optimizer, 0, critic)
    saved = _saved_keys(folder, state["model"])
    if critic is not None and "critic_steps" not in saved:
        raise RunDirError(
            f"{folder} holds no critic",
            "a run cannot change to advantage=gae on its way: start another",
        )
    own = f"rng.{dist.get_rank()}"
    ranks = sum(key.startswith("rng.") for key in saved)
    if ranks != dist.get_world_size():
        del state[own]
    dcp.load(state, checkpoint_id=folder)
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
    """Read the weights of a `trainer/` folder only.

    Raises:
        RunDirError: the folder holds no checkpoint of this model.
    """
    state = _kept(get_model_state_dict(model))
    _saved_keys(folder, state)
    dcp.load({"model": state}, checkpoint_id=folder)
    set_model_state_dict(model, state, options=_READ)


def _kept(model_state: dict[str, Any]) -> dict[str, Any]:
    """What of a model's state is saved: with adapters these alone, the base is that of `model.path`."""
    return {key: tensor for key, tensor in model_state.items() if is_adapter(key)} or model_state


_READ = StateDictOptions(strict=False)
"""A state with adapters alone is no whole one. `_saved_keys` has looked whether all that is needed is there."""


def _saved_keys(folder: Path, model_state: dict[str, Any]) -> set[str]:
    """The keys of a checkpoint, after a look whether it is one of this model."""
    if not (folder / ".metadata").is_file():
        raise RunDirError(f"{folder} holds no checkpoint", "resume from a folder that `save` has written")
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for key, tensor in model_state.items():
        entry = entries.get(f"model.{key}")
        if entry is None or entry.size != tensor.shape:
            fault = "missing" if entry is None else "of another shape"
            raise RunDirError(f"{folder} is a checkpoint of another model: {key} is {fault}", "check model.path")
    return set(entries)


def _state_dict(
    model: PolicyModel, optimizer: torch.optim.Optimizer, steps: int, critic: Critic | None
) -> dict[str, Any]:
    model_state, optimizer_state = _model_and_optimizer(model, optimizer)
    state = {
        "model": _kept(model_state),
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
    if fresh:  # torch has made the state by a step that changes nothing but this counter
        for entry in optimizer.state.values():
            entry["step"].zero_()
    return model_state, optimizer_state
