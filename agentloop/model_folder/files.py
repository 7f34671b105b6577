"""The files of a model folder: JSON, and the headers of its safetensors. Reads no tensor."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentloop.errors import ModelError
from agentloop.weights.layout import LayoutError, TensorSpec, read_layout

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of the small text that stands for a large file in a repository without Git LFS."""

AGAIN = "download or save the model again"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Files of transformers' distributed training, which from_pretrained prefers to all others."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a model's files: its place and the file."""

    spec: TensorSpec
    file: Path


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file of a model folder.

    Raises:
        ModelError: it cannot be read, or holds something other than a JSON object.
    """
    refuse_pointer(file)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ModelError(f"{file} cannot be read: {exc.strerror or exc}", AGAIN) from exc
    except (ValueError, RecursionError) as exc:
        raise ModelError(f"{file} is not a JSON object: {exc}", AGAIN) from exc
    if not isinstance(value, dict):
        raise ModelError(f"{file} is not a JSON object: it holds a {type(value).__name__}", AGAIN)
    return value


def refuse_pointer(file: Path) -> None:
    """Refuse a Git LFS pointer. A file that cannot be read is left to whoever reads it.

    Raises:
        ModelError: the file is such a pointer.
    """
    try:
        with file.open("rb") as opened:
            begin = opened.read(len(LFS_POINTER))
    except OSError:
        return
    if begin == LFS_POINTER:
        raise ModelError(
            f"{file} is a Git LFS pointer, not the file itself",
            f"run `git lfs pull` in {file.parent}, or download the model again",
        )


def read_weights(folder: Path, named: str | None = None) -> dict[str, StoredTensor]:
    """Return the tensors of a model folder by name, from the headers of its safetensors files.

    Args:
        named: the weight file that config.json names (`transformers_weights`); None: the usual.

    Raises:
        ModelError: the folder has no safetensors, or one of its files is missing, damaged or a Git
            LFS pointer, or holds a tensor that another one holds too.
    """
    index, files = _weight_files(folder, named)
    found: dict[str, StoredTensor] = {}
    for file in files:
        refuse_pointer(file)
        try:
            specs = read_layout(file)
        except LayoutError as exc:
            raise ModelError(str(exc), AGAIN) from exc
        except OSError as exc:
            raise ModelError(f"{file} cannot be read: {exc.strerror or exc}", "check its permissions") from exc
        for spec in specs:
            if spec.name in found:
                raise ModelError(f"{found[spec.name].file} and {file} both hold {spec.name}", AGAIN)
            found[spec.name] = StoredTensor(spec, file)

    for name, file_name in index.items():
        if name not in found or found[name].file.name != file_name:
            raise ModelError(f"{folder / file_name} lacks {name}, which the index of the weights places there", AGAIN)
    return found


def _weight_files(folder: Path, named: str | None) -> tuple[dict[str, str], list[Path]]:
    """Return the map of the index (empty without one), and the weight files.

    The rules are those of transformers, so that every part of a run reads the same files.
    """
    _refuse_distributed(folder)
    if named is not None:
        _refuse_path(named, f"transformers_weights of {folder / 'config.json'}")
        single, index = (None, folder / named) if named.endswith(".json") else (folder / named, None)
    else:
        single, index = folder / SINGLE, folder / INDEX

    if index is not None and index.is_file():
        mapping = _read_index(index)
        names = sorted(set(mapping.values()))
        if single is not None and single.is_file() and names != [SINGLE]:
            raise ModelError(
                f"{folder} holds weights twice: {SINGLE}, and the files of {INDEX}",
                f"remove {SINGLE}, or {INDEX} and its files, whichever is older",
            )
        return mapping, [folder / name for name in names]
    if single is not None and single.is_file():
        return {}, [single]

    missing = single or index
    assert missing is not None
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} has no {missing.name}, only {pickles[0]}: such files are pickles, which can run code, and are "
            "never loaded",
            "load the model with transformers, and save it with save_pretrained, which writes safetensors",
        )
    raise ModelError(
        f"{folder} holds no weights: it has neither {SINGLE} nor {INDEX}"
        if named is None
        else f"{missing}, which transformers_weights of config.json names, is missing",
        "give a folder with config.json and safetensors, or a hub id",
    )


def _read_index(index: Path) -> dict[str, str]:
    """Return the `weight_map` of an index: the file name of each tensor."""
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise ModelError(f"{index} has no weight_map from tensors to files", AGAIN)
    for name in sorted(set(mapping.values())):
        _refuse_path(name, str(index))
        if not (index.parent / name).is_file():
            raise ModelError(f"{index} names {name}, which is missing", "download the whole model again")
    return mapping


def _refuse_path(name: str, where: str) -> None:
    if Path(name).name != name or "\0" in name:
        raise ModelError(f"{where} names {name!r}, outside its folder", "keep all files in one folder")


def _refuse_distributed(folder: Path) -> None:
    for file in folder.glob("shard-*.safetensors"):
        if _DISTRIBUTED.fullmatch(file.name):
            raise ModelError(
                f"{folder} holds a distributed checkpoint ({file.name}), which transformers would load instead of the "
                "model's weights",
                "merge it into a model with transformers, or remove its files",
            )
