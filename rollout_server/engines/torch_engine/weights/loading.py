"""New weights are taken in beside the live ones, checked whole, and only then put in their place."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentloop.weights.layout import (
    CHUNK,
    CODES,
    Digest,
    LayoutError,
    TensorSpec,
    checksum,
    digest_of,
    read_layout,
    tensor_bytes,
)
from agentloop.weights.shared import STALLED_S, SharedReader, StalledError
from rollout_server.engines.base import BroadcastWeights, FolderWeights, SharedWeights, WeightsSource
from rollout_server.engines.torch_engine.weights.groups import Groups
from rollout_server.errors import WeightsError

OLD_PREFIXES = (("visual.", "model.visual."), ("model.", "model.language_model."))
"""Prefixes in checkpoints of Qwen2-VL and Qwen2.5-VL, and what transformers calls them in the model."""

INDEX = "model.safetensors.index.json"

SHARED_FOLDERS = 2
"""A trainer writes to two in turn; their mappings are kept."""

_ALIGNMENT = 64


@dataclass(slots=True)
class StagedWeights:
    """A version that is ready to be served: tensors by the name of the parameter or buffer that they belong to."""

    tensors: dict[str, torch.Tensor]
    checksum: str
    memory: np.ndarray | None = None
    """Of the intake's own, when tensors lie in it."""


class WeightLoader:
    """Reads versions for one model. One at a time, on any thread but the engine's."""

    def __init__(self, model: Any) -> None:
        self._live_tensors: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        self._tied = list(_owners(self._live_tensors).values())
        self._readers: dict[Path, SharedReader] = {}
        self._shared: dict[Path, tuple[np.ndarray, _Check, dict[str, torch.Tensor]]] = {}
        self._live: np.ndarray | None = None
        self._spare: np.ndarray | None = None
        self.groups = Groups()

    def take(self, source: WeightsSource, version: str = "") -> StagedWeights:
        """All tensors that the model needs, verified: names, shapes, finite values, checksum. Nothing live is changed.

        Raises:
            WeightsError: naming the first thing that does not fit.
        """
        try:
            match source:
                case FolderWeights():
                    taken = self._from_folder(source)
                case SharedWeights():
                    taken = self._from_shared(source, version)
                case BroadcastWeights():
                    taken = self._from_group(source)
        except (LayoutError, StalledError, OSError) as exc:
            raise WeightsError(str(exc)) from exc
        if source.checksum is not None and taken.checksum != source.checksum:
            raise WeightsError(f"the weights arrived as {taken.checksum}, they were published as {source.checksum}")
        return taken

    def put(self, taken: StagedWeights) -> list[torch.Tensor]:
        """Serve what was taken; between two steps. Returns what was served before, to be let go of elsewhere: giving
        gigabytes back takes long."""
        before = _adopt(self._live_tensors, self._tied, taken.tensors)
        if taken.memory is not self._live:
            # The memory of the version before is written next: pages that exist already are many times faster.
            self._spare, self._live = self._live, taken.memory
        return before

    def _from_folder(self, source: FolderWeights) -> StagedWeights:
        folder = source.folder
        files = [(file, read_layout(file)) for file in safetensors_files(folder)]
        check = self._check(str(folder), [spec for _, specs in files for spec in specs])
        # The file's own alignment is anybody's: here every tensor begins where it can be used.
        begins = np.cumsum([0, *(_padded(spec.end - spec.begin) for spec in check.specs)])
        memory = self._memory(int(begins[-1]))
        places = iter(begins.tolist())
        tensors = []
        for path, specs in files:
            with path.open("rb", buffering=0) as file:
                for spec in specs:
                    begin = next(places)
                    place = memory[begin : begin + spec.end - spec.begin]
                    digest = Digest(spec.dtype)
                    file.seek(spec.begin)
                    for at in range(0, len(place), CHUNK):
                        _fill(file, place[at : at + CHUNK])
                        digest.add(place[at : at + CHUNK])
                    check.digest(spec, digest)
                    tensors.append((spec, place))
        return check.taken(tensors, memory)

    def _from_shared(self, source: SharedWeights, version: str) -> StagedWeights:
        folder = source.folder
        reader = self._readers.pop(folder, None) or SharedReader(folder)
        self._readers[folder] = reader
        while len(self._readers) > SHARED_FOLDERS:
            oldest = next(iter(self._readers))
            del self._readers[oldest]
            self._shared.pop(oldest, None)
        check: _Check | None = None
        digest, current = Digest(""), None
        for spec, piece in reader.follow(version, STALLED_S):
            if check is None:
                check, lying = self._lying(reader)
            if spec is not current:
                digest, current = Digest(spec.dtype), spec
            for at in range(0, len(piece), CHUNK):
                digest.add(piece[at : at + CHUNK])
            check.digest(spec, digest)
        if check is None:
            raise WeightsError(f"{folder} holds no tensors")
        taken = StagedWeights(check.in_dtype(lying), check.checksum)
        written = reader.checksum()
        if written and taken.checksum != written:
            raise WeightsError(f"the weights arrived as {taken.checksum}, they were written as {written}")
        return taken

    def _lying(self, reader: SharedReader) -> tuple[_Check, dict[str, torch.Tensor]]:
        """The tensors in a shared file, before they are read. Every other version lies in the same places."""
        known = self._shared.get(reader.folder)
        if known is None or known[0] is not reader.data:
            check = self._check(str(reader.folder), reader.specs)
            lying = check.lying((spec, reader.data[spec.begin : spec.end]) for spec in reader.specs)
            known = self._shared[reader.folder] = (reader.data, check, lying)
        return known[1], known[2]

    def _from_group(self, source: BroadcastWeights) -> StagedWeights:
        specs = _specs_of(source)
        check = self._check("the broadcast", specs)
        device = self.groups.device(source.group)
        size = specs[-1].end if specs else 0
        memory = self._memory(size) if device.type == "cpu" else None
        whole = torch.empty(size, dtype=torch.uint8, device=device) if memory is None else torch.from_numpy(memory)
        self.groups.receive(source, specs, whole)
        tensors = []
        for spec in specs:
            place = whole[spec.begin : spec.end]
            check.digest(spec, digest_of(place.cpu().numpy(), spec.dtype))
            tensors.append((spec, place))
        return check.taken(tensors, memory)

    def _check(self, where: str, specs: Iterable[TensorSpec]) -> _Check:
        return _Check(self._live_tensors, self._tied, where, specs)

    def _memory(self, size: int) -> np.ndarray:
        if self._spare is None or len(self._spare) != size:
            self._spare = np.empty(size, np.uint8)
        return self._spare


class _Check:
    """Whether a set of tensors is the model's, whole.

    Raises:
        WeightsError: naming the first that is missing, too many or of another shape.
    """

    def __init__(
        self, wanted: dict[str, torch.Tensor], tied: list[list[str]], where: str, specs: Iterable[TensorSpec]
    ) -> None:
        self.specs = list(specs)
        self._where = where
        self._wanted = wanted
        self._names: dict[str, str] = {}
        self._digests: dict[str, int] = {}
        self._odd: dict[str, TensorSpec] = {}
        for spec in self.specs:
            name = self._name_of(spec.name)
            if not name:
                raise WeightsError(f"{where}: the model has no parameter {spec.name!r}")
            if name in self._names.values():
                raise WeightsError(f"{where} holds {spec.name!r} twice")
            if spec.shape != tuple(self._wanted[name].shape):
                shapes = f"{list(spec.shape)}, the model's {list(self._wanted[name].shape)}"
                raise WeightsError(f"{where}: {name} has shape {shapes}")
            self._names[spec.name] = name
        given = set(self._names.values())
        for names in tied:
            # Tied parameters are one tensor under several names: any of them will do.
            if not given.intersection(names):
                raise WeightsError(f"{where} lacks {names[0]!r}")

    def digest(self, spec: TensorSpec, digest: Digest) -> None:
        if not digest.finite:
            raise WeightsError(f"{self._where}: {self._names[spec.name]} holds NaN or infinite values")
        self._digests[spec.name] = digest.value

    @property
    def checksum(self) -> str:
        return checksum(self._digests)

    def taken(
        self, places: Iterable[tuple[TensorSpec, np.ndarray | torch.Tensor]], memory: np.ndarray | None = None
    ) -> StagedWeights:
        """What has been read, in the dtype of the live tensors."""
        lying = self.lying(places)
        tensors = self.in_dtype(lying)
        stays = any(tensors[name] is lying[name] for name in tensors)
        return StagedWeights(tensors, self.checksum, memory if stays else None)

    def lying(self, places: Iterable[tuple[TensorSpec, np.ndarray | torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The tensors where they lie; one at a place that no tensor can have is copied in `in_dtype`."""
        tensors = {}
        for spec, place in places:
            flat = place if isinstance(place, torch.Tensor) else torch.from_numpy(place)
            odd = flat.data_ptr() % CODES[spec.dtype][1]
            tensors[self._names[spec.name]] = flat if odd else _shaped(flat, spec.dtype, spec.shape)
            if odd:
                self._odd[self._names[spec.name]] = spec
        return tensors

    def in_dtype(self, lying: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same in the dtype of the live ones."""
        tensors = {}
        for name, tensor in lying.items():
            if (spec := self._odd.get(name)) is not None:
                tensor = _shaped(tensor.clone(), spec.dtype, spec.shape)
            wanted = self._wanted[name].dtype
            tensors[name] = tensor if tensor.dtype == wanted else tensor.to(wanted)
        return tensors

    def _name_of(self, written: str) -> str:
        """The model's name of a tensor; empty when it has none."""
        names = (written, *(new + written[len(old) :] for old, new in OLD_PREFIXES if written.startswith(old)))
        return next((name for name in names if name in self._wanted), "")


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


def _owners(tensors: dict[str, torch.Tensor]) -> dict[int, list[str]]:
    """Names by where their tensor lies."""
    owners: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        owners.setdefault(tensor.data_ptr(), []).append(name)
    return owners


def _shaped(flat: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return flat.view(getattr(torch, dtype)).view(shape)


@torch.no_grad()
def _adopt(
    live: dict[str, torch.Tensor], tied: list[list[str]], tensors: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Make parameters of the tensors without a copy where device and dtype allow; returns the tensors before."""
    before = []
    for names in tied:
        for name in names:
            if name not in tensors:
                continue
            new, old = tensors[name], live[name]
            if not isinstance(old, torch.nn.Parameter) or (old.device, old.dtype) != (new.device, new.dtype):
                old.copy_(new)
                continue
            before.append(old.data)
            for other in names:
                live[other].data = new
    return before


def _specs_of(source: BroadcastWeights) -> list[TensorSpec]:
    """Tensors in a row, in the order of the broadcasts."""
    specs, at = [], 0
    for name, dtype, shape in zip(source.names, source.dtypes, source.shapes, strict=True):
        size = tensor_bytes(dtype, shape)
        specs.append(TensorSpec(name, dtype, tuple(shape), at, at + size))
        at += size
    return specs


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _fill(file: Any, place: np.ndarray) -> None:
    view = place.data
    while view:
        count = file.readinto(view)
        if not count:
            raise LayoutError(f"{file.name} cannot be read: it became shorter meanwhile")
        view = view[count:]
