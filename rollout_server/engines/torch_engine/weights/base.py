"""The base of all weight transports: served tensors, checks of a new version, its staged form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from agentloop.weights.layout import CODES, Digest, TensorSpec, checksum
from rollout_server.errors import WeightsError

OLD_PREFIXES = (("visual.", "model.visual."), ("model.", "model.language_model."))
"""Prefixes in checkpoints of Qwen2-VL and Qwen2.5-VL, and the names that transformers gives them in
the model."""

SourceT = TypeVar("SourceT", contravariant=True)


@dataclass(slots=True)
class StagedWeights:
    """A version that is ready to be served.

    Attributes:
        tensors: by the name of the parameter or buffer that they replace, in its dtype.
        checksum: of the tensors as they were published.
        memory: the buffer of `LiveWeights.memory` that tensors lie in; None if they lie elsewhere.
    """

    tensors: dict[str, torch.Tensor]
    checksum: str
    memory: np.ndarray | None = None


class Transport(Protocol[SourceT]):
    """Brings published weights into this process. One call at a time, on any thread but the
    engine's."""

    def stage(self, source: SourceT, version: str) -> StagedWeights:
        """Read and verify all tensors of a version. Nothing that is served changes.

        Raises:
            WeightsError: the weights do not belong to the model.
            LayoutError, StalledError, OSError: they cannot be read. `WeightLoader` makes a
                `WeightsError` of them.
        """
        ...


class LiveWeights:
    """The tensors that a model serves, and memory for the next ones."""

    def __init__(self, model: Any) -> None:
        self._tensors: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        self._tied = _tied_names(self._tensors)
        self._memory: np.ndarray | None = None
        self._spare: np.ndarray | None = None

    def check(self, where: str, specs: Iterable[TensorSpec]) -> TensorCheck:
        """Start the check of a new version; `where` names it in errors.

        Raises:
            WeightsError: names or shapes are not the model's.
        """
        return TensorCheck(self._tensors, self._tied, where, specs)

    def memory(self, size: int) -> np.ndarray:
        """A buffer of `size` bytes that no served tensor lies in."""
        if self._spare is None or len(self._spare) != size:
            self._spare = np.empty(size, np.uint8)
        return self._spare

    @torch.no_grad()
    def swap_in(self, staged: StagedWeights) -> list[torch.Tensor]:
        """Serve `staged`, without a copy where possible; returns the tensors served before."""
        before = []
        for names in self._tied:
            for name in names:
                if name not in staged.tensors:
                    continue

                new, old = staged.tensors[name], self._tensors[name]
                if not isinstance(old, torch.nn.Parameter) or (old.device, old.dtype) != (new.device, new.dtype):
                    old.copy_(new)
                    continue

                before.append(old.data)
                for other in names:
                    self._tensors[other].data = new

        if staged.memory is not self._memory:
            # The next version is written over the one before: pages that exist already are many
            # times faster.
            self._spare, self._memory = self._memory, staged.memory
        return before


class TensorCheck:
    """Verifies that a set of tensors belongs to the model: names and shapes at the start, finite
    values as digests arrive.

    Raises:
        WeightsError: naming the first tensor that is missing, unknown, given twice or of another
            shape.
    """

    def __init__(
        self, wanted: dict[str, torch.Tensor], tied: list[list[str]], where: str, specs: Iterable[TensorSpec]
    ) -> None:
        self.specs = list(specs)
        self._where = where
        self._wanted = wanted
        self._names: dict[str, str] = {}
        self._digests: dict[str, int] = {}
        self._misaligned: dict[str, TensorSpec] = {}

        for spec in self.specs:
            name = self._model_name(spec.name)
            if not name:
                raise WeightsError(f"{where}: the model has no parameter {spec.name!r}")
            if name in self._names.values():
                raise WeightsError(f"{where} contains {spec.name!r} twice")
            if spec.shape != tuple(self._wanted[name].shape):
                shapes = f"{list(spec.shape)}, the model expects {list(self._wanted[name].shape)}"
                raise WeightsError(f"{where}: {name} has shape {shapes}")
            self._names[spec.name] = name

        given = set(self._names.values())
        for names in tied:
            # Tied parameters are one tensor under several names; any of the names is enough.
            if not given.intersection(names):
                raise WeightsError(f"{where} lacks {names[0]!r}")

    def add(self, spec: TensorSpec, digest: Digest) -> None:
        """Record the digest of a tensor, or of its first chunks; a later call replaces it.

        Raises:
            WeightsError: it contains NaN or infinite values.
        """
        if not digest.finite:
            raise WeightsError(f"{self._where}: {self._names[spec.name]} contains NaN or infinite values")
        self._digests[spec.name] = digest.value

    @property
    def checksum(self) -> str:
        """Of all tensors whose digests were added."""
        return checksum(self._digests)

    def staged(
        self, places: Iterable[tuple[TensorSpec, np.ndarray | torch.Tensor]], memory: np.ndarray | None = None
    ) -> StagedWeights:
        """The tensors at `places` (flat uint8), ready to be served; `memory` is their buffer."""
        views = self.views(places)
        tensors = self.cast(views)
        in_memory = any(tensors[name] is views[name] for name in tensors)
        return StagedWeights(tensors, self.checksum, memory if in_memory else None)

    def views(self, places: Iterable[tuple[TensorSpec, np.ndarray | torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the tensors in place. An unaligned tensor stays flat until `cast` copies it."""
        tensors = {}
        for spec, place in places:
            flat = place if isinstance(place, torch.Tensor) else torch.from_numpy(place)
            misaligned = flat.data_ptr() % CODES[spec.dtype][1]
            tensors[self._names[spec.name]] = flat if misaligned else _shaped(flat, spec.dtype, spec.shape)
            if misaligned:
                self._misaligned[self._names[spec.name]] = spec
        return tensors

    def cast(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of `views` in the model's dtypes; unchanged objects where possible."""
        tensors = {}
        for name, tensor in views.items():
            if (spec := self._misaligned.get(name)) is not None:
                tensor = _shaped(tensor.clone(), spec.dtype, spec.shape)
            wanted = self._wanted[name].dtype
            tensors[name] = tensor if tensor.dtype == wanted else tensor.to(wanted)
        return tensors

    def _model_name(self, written: str) -> str:
        """Return the model's name of a tensor; empty if it has none."""
        names = (written, *(new + written[len(old) :] for old, new in OLD_PREFIXES if written.startswith(old)))
        return next((name for name in names if name in self._wanted), "")


def _tied_names(tensors: dict[str, torch.Tensor]) -> list[list[str]]:
    """Names grouped by the memory that their tensors share."""
    owners: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        owners.setdefault(tensor.data_ptr(), []).append(name)
    return list(owners.values())


def _shaped(flat: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return flat.view(getattr(torch, dtype)).view(shape)
