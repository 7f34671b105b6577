"""Weights published as safetensors files in a folder: read into memory of this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from agentloop.weights.layout import CHUNK, Digest, LayoutError, read_layout
from rollout_server.engines.base import FolderWeights
from rollout_server.engines.torch_engine.weights.base import LiveWeights, StagedWeights
from rollout_server.errors import WeightsError

INDEX = "model.safetensors.index.json"

_ALIGNMENT = 64


class DiskTransport:
    """Stages `FolderWeights`."""

    def __init__(self, live: LiveWeights) -> None:
        self._live = live

    def stage(self, source: FolderWeights, version: str) -> StagedWeights:
        """Read the folder's tensors, checked while they are read."""
        files = [(file, read_layout(file)) for file in safetensors_files(source.folder)]
        check = self._live.check(str(source.folder), [spec for _, specs in files for spec in specs])

        # A file may place tensors at any byte. In memory each one is aligned, to be served in
        # place.
        begins = np.cumsum([0, *(_padded(spec.end - spec.begin) for spec in check.specs)])
        memory = self._live.memory(int(begins[-1]))
        places = iter(begins.tolist())

        tensors = []
        for path, specs in files:
            with path.open("rb", buffering=0) as file:
                for spec in specs:
                    begin = next(places)
                    place = memory[begin : begin + spec.end - spec.begin]
                    digest = Digest(spec.dtype)
                    file.seek(spec.begin)
                    # Hashed chunk by chunk, while the chunk is still in the core's cache.
                    for at in range(0, len(place), CHUNK):
                        _fill(file, place[at : at + CHUNK])
                        digest.add(place[at : at + CHUNK])
                    check.add(spec, digest)
                    tensors.append((spec, place))
        return check.staged(tensors, memory)


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a folder: those that its index names; without an index, all of them.

    Raises:
        WeightsError: there are none, or a file that the index names is missing.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as exc:
            raise WeightsError(f"{index} is not a safetensors index: {exc!r}; publish the weights again") from exc
        if any(Path(name).name != name for name in names):
            raise WeightsError(f"{index} names files outside its folder; keep all files in one folder")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))

    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise WeightsError(f"{folder} lacks {', '.join(missing) or 'safetensors files'}")
    return files


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _fill(file: Any, place: np.ndarray) -> None:
    view = place.data
    while view:
        count = file.readinto(view)
        if not count:
            raise LayoutError(f"{file.name} cannot be read: it was truncated while it was read")
        view = view[count:]
