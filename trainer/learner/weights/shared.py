"""Publish to shared memory: a file that engines read while it is written
(`agentloop.weights.shared`)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from agentloop.files import disk_errors
from agentloop.weights.layout import Digest, TensorSpec, checksum
from agentloop.weights.shared import PROGRESS_BYTES, SharedWriter
from trainer.learner.weights.base import PublishedTensors, chunks, is_first_rank
from trainer.types import Published


class SharedTransport:
    """Writes versions to folders in shared memory, each over an earlier version."""

    def __init__(self, tensors: PublishedTensors) -> None:
        self._tensors = tensors
        self._writers: dict[Path, SharedWriter] = {}

    def publish(self, *, folder: Path, reader_s: float = 0.0) -> Published:
        """Write `folder/model.safetensors` over the version in it.

        Args:
            reader_s: how long to wait for the first reader before writing.
        """
        if not is_first_rank():
            self._tensors.gather(None)
            return Published("")
        file = self.open(folder, reader_s)
        self._tensors.gather(file.add)
        return Published(file.finish())

    def open(self, folder: Path, reader_s: float = 0.0) -> SharedFile:
        """Begin a version in `folder`; on rank 0.

        Raises:
            DiskError: there is not enough room.
        """
        with disk_errors(folder):
            writer = self._writers.get(folder)
            if writer is None:
                # Kept from one version to the next: existing pages are much faster to write.
                writer = self._writers[folder] = SharedWriter(folder)
                self._tensors.write_config(folder)
            writer.open(self._tensors.header, self._tensors.specs[-1].end)
        if reader_s:
            writer.progress.wait_for_reader(reader_s)
        return SharedFile(writer)


class SharedFile:
    """One version while it is written to a shared file."""

    def __init__(self, writer: SharedWriter) -> None:
        self._writer = writer
        self._digests: dict[str, int] = {}

    def add(self, spec: TensorSpec, tensor: Tensor) -> None:
        """Write a tensor to its place, and report the progress to the readers."""
        data, progress = self._writer.data, self._writer.progress
        digest = Digest("")
        add = digest.add

        at = reached = spec.begin
        for chunk in chunks(tensor, spec.dtype):
            end = at + len(chunk)
            place = data[at:end]
            place[:] = chunk
            add(place)  # right after the copy, while it is still in the core's cache
            at = end
            if at - reached >= PROGRESS_BYTES:
                progress.reach(at)
                reached = at

        progress.reach(spec.end)
        self._digests[spec.name] = digest.value

    def finish(self) -> str:
        """Mark the version as complete and return its checksum."""
        whole = checksum(self._digests)
        self._writer.progress.finish(whole)
        return whole
