"""Checkpoints and published weights: written whole under a temporary name, then renamed."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from agentloop.errors import RunDirError
from trainer.model import DTYPES, PolicyModel

MAX_SHARD_BYTES = 4 * 2**30
STATE_FILE = "state.json"
"""What the run adds to a checkpoint; written last, so that a folder with it is whole."""

TENSORS = "trainer"
"""The folder of a checkpoint that holds model, optimizer and random state."""


def save_checkpoint(
    folder: Path, model: PolicyModel, optimizer: torch.optim.Optimizer, steps: int, state: dict[str, Any]
) -> None:
    """Write `folder/trainer/` (torch.distributed.checkpoint) and `folder/state.json`. All ranks call it together."""
    partial = folder.with_name(f".{folder.name}.partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dcp.save(_state_dict(model, optimizer, steps), checkpoint_id=partial / TENSORS)
    if dist.get_rank() == 0:
        (partial / STATE_FILE).write_text(json.dumps(state))
        _rename(partial, folder)
    dist.barrier()


def load_checkpoint(folder: Path, model: PolicyModel, optimizer: torch.optim.Optimizer) -> int:
    """Read a `trainer/` folder into model, optimizer and random state; returns the optimizer steps taken so far.

    The number of ranks may differ from that of the run that saved; random state is then left as it is.

    Raises:
        RunDirError: the folder holds no checkpoint of this model.
    """
    state = _state_dict(model, optimizer, 0)
    saved = _saved_keys(folder, state["model"])
    own = f"rng.{dist.get_rank()}"
    ranks = sum(key.startswith("rng.") for key in saved)
    if ranks != dist.get_world_size():
        del state[own]
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if own in state:
        torch.set_rng_state(state[own])
    return int(state["steps"].item())


def load_model(folder: Path, model: PolicyModel) -> None:
    """Read the weights of a `trainer/` folder only.

    Raises:
        RunDirError: the folder holds no checkpoint of this model.
    """
    state = get_model_state_dict(model)
    _saved_keys(folder, state)
    dcp.load({"model": state}, checkpoint_id=folder)
    set_model_state_dict(model, state)


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


def _state_dict(model: PolicyModel, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Any]:
    fresh = not optimizer.state
    model_state, optimizer_state = get_state_dict(model, optimizer)
    if fresh:  # torch has made the state by a step that changes nothing but this counter
        for entry in optimizer.state.values():
            entry["step"].zero_()
    return {
        "model": model_state,
        "optimizer": optimizer_state,
        "steps": torch.tensor(steps),
        f"rng.{dist.get_rank()}": torch.get_rng_state(),
    }


def publish_weights(folder: Path, model: PolicyModel, dtype: str) -> None:
    """Write a Hugging Face folder: safetensors in `dtype`, config.json, generation_config.json. All ranks call it."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.lm.named_parameters():  # tied weights appear once, under their first name
        full = parameter.detach()
        if isinstance(full, DTensor):
            full = full.full_tensor()
        if dist.get_rank() == 0:
            tensors[name] = full.to(device="cpu", dtype=DTYPES[dtype]).contiguous()
    if dist.get_rank() == 0:
        for name, buffer in model.lm.named_buffers():
            if name in model.lm.state_dict():
                tensors[name] = buffer.detach().cpu().contiguous()
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_safetensors(partial, tensors)
        config = copy.deepcopy(model.lm.config)
        config.dtype = DTYPES[dtype]
        config.architectures = [type(model.lm).__name__]
        config.save_pretrained(partial)
        for file in partial.glob("*.safetensors"):  # which safetensors makes readable for the owner only
            shutil.copymode(partial / "config.json", file)
        if model.lm.can_generate():
            model.lm.generation_config.to_json_file(partial / "generation_config.json")
        _rename(partial, folder)
    dist.barrier()


def _write_safetensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """One file, or several with an index where the model is larger than one shard."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    metadata = {"format": "pt"}
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata)
        return
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata)
        index |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    )


def _rename(partial: Path, folder: Path) -> None:
    """Move a finished folder to its name; one that stands there is replaced."""
    if folder.exists():
        stale = folder.with_name(f".{folder.name}.stale")
        shutil.rmtree(stale, ignore_errors=True)
        os.rename(folder, stale)  # noqa: PTH104
        os.rename(partial, folder)  # noqa: PTH104
        shutil.rmtree(stale)
    else:
        os.rename(partial, folder)  # noqa: PTH104
