"""Published weights: read and checked whole before a live parameter is touched."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rollout_server.engines.base import WeightsError

OLD_PREFIXES = (("visual.", "model.visual."), ("model.", "model.language_model."))
"""Prefixes in checkpoints of Qwen2-VL and Qwen2.5-VL, and what transformers calls them in the model."""

INDEX = "model.safetensors.index.json"


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a folder: those its index names, else all of them.

    Raises:
        WeightsError: there are none, or one that the index names is missing.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as exc:
            raise WeightsError(f"{index} is no safetensors index: {exc!r}") from exc
        if any(Path(name).name != name for name in names):
            raise WeightsError(f"{index} names files outside its folder")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise WeightsError(f"{folder} lacks {', '.join(missing) or 'safetensors files'}")
    return files


def read_weights(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    """All tensors that `model` needs from `folder`, verified: names, shapes, finite values. Nothing live is changed.

    Returns:
        Tensors by the name of the parameter or buffer they belong to.

    Raises:
        WeightsError: naming the first thing that does not fit.
    """
    wanted: dict[str, torch.Tensor] = model.state_dict()
    owners: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        owners.setdefault(tensor.data_ptr(), []).append(name)
    found: dict[str, torch.Tensor] = {}
    for written, tensor in _tensors(folder):
        name = _name_in(wanted, written)
        if not name:
            raise WeightsError(f"{folder}: the model has no parameter {written!r}")
        if tensor.shape != wanted[name].shape:
            shapes = f"{list(tensor.shape)}, the model's {list(wanted[name].shape)}"
            raise WeightsError(f"{folder}: {name} has shape {shapes}")
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{folder}: {name} holds NaN or infinite values")
        found[name] = tensor
    for names in owners.values():
        # Tied parameters are one tensor under several names: any of them will do.
        if not any(name in found for name in names):
            raise WeightsError(f"{folder} lacks {names[0]!r}")
    return found


def _name_in(wanted: Container[str], written: str) -> str:
    """The model's name of a tensor; empty when it has none."""
    names = (written, *(new + written[len(old) :] for old, new in OLD_PREFIXES if written.startswith(old)))
    return next((name for name in names if name in wanted), "")


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in safetensors_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # not a dict
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as exc:
            raise WeightsError(f"{file} cannot be read: {exc}") from exc


@torch.inference_mode()
def apply_weights(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Copy verified tensors into the live parameters."""
    live = model.state_dict()
    for name, tensor in tensors.items():
        live[name].copy_(tensor)
