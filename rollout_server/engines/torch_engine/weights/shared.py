"""Weights published in a file in shared memory: mapped, and checked while the trainer writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from agentloop.weights.layout import CHUNK, Digest
from agentloop.weights.shared import STALLED_S, SharedReader
from rollout_server.engines.base import SharedWeights
from rollout_server.engines.torch_engine.weights.base import LiveWeights, StagedWeights, TensorCheck
from rollout_server.errors import WeightsError

FOLDERS = 2
"""Folders whose mappings are kept open: a trainer writes to two in turn."""


class SharedTransport:
    """Stages `SharedWeights`."""

    def __init__(self, live: LiveWeights) -> None:
        self._live = live
        self._readers: dict[Path, SharedReader] = {}
        self._views: dict[Path, tuple[np.ndarray, TensorCheck, dict[str, torch.Tensor]]] = {}

    def stage(self, source: SharedWeights, version: str) -> StagedWeights:
        """Follow the writer of the folder's file to its end, checking tensors as they complete."""
        reader = self._reader(source.folder)
        check: TensorCheck | None = None
        digest, current = Digest(""), None
        for spec, chunk in reader.follow(version, STALLED_S):
            if check is None:
                # Here, because the file is mapped when its first chunk arrives.
                check, views = self._views_of(reader)
            if spec is not current:
                digest, current = Digest(spec.dtype), spec
            for at in range(0, len(chunk), CHUNK):
                digest.add(chunk[at : at + CHUNK])
            check.add(spec, digest)
        if check is None:
            raise WeightsError(f"{source.folder} contains no tensors")

        staged = StagedWeights(check.cast(views), check.checksum)
        written = reader.checksum()
        if written and staged.checksum != written:
            raise WeightsError(
                f"checksum mismatch in {source.folder}: {staged.checksum} was read, {written} was written"
            )
        return staged

    def _reader(self, folder: Path) -> SharedReader:
        """The reader of a folder; the least recently used ones are dropped, and with them their
        mappings."""
        reader = self._readers.pop(folder, None) or SharedReader(folder)
        self._readers[folder] = reader
        while len(self._readers) > FOLDERS:
            oldest = next(iter(self._readers))
            del self._readers[oldest]
            self._views.pop(oldest, None)
        return reader

    def _views_of(self, reader: SharedReader) -> tuple[TensorCheck, dict[str, torch.Tensor]]:
        """The check and the tensors of a file, made once for each mapping of it."""
        known = self._views.get(reader.folder)
        if known is None or known[0] is not reader.data:
            check = self._live.check(str(reader.folder), reader.specs)
            views = check.views((spec, reader.data[spec.begin : spec.end]) for spec in reader.specs)
            known = self._views[reader.folder] = (reader.data, check, views)
        return known[1], known[2]
