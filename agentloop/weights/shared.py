"""A weights file in shared memory that is read while it is being written. No torch.

A published version is a folder with `model.safetensors`, as every loader of weights knows it, and `progress`, which
says which version is in the file and how much of it is complete. The trainer has two such folders and writes every
other version to the same one: pages that exist already are overwritten, which is many times faster than making new
ones, and the version that is served stays as it is.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from agentloop.weights.layout import TensorSpec, read_layout

WEIGHTS = "model.safetensors"
PROGRESS = "progress"
MAX_VERSION_BYTES = 64
POLL_S = 0.0002

PROGRESS_BYTES = 4 * 2**20
"""Bytes after which the writer says how far it is: what was written just before is read from the cores' caches."""

STALLED_S = 30.0
"""A writer that writes nothing more for so long is taken for dead."""

BEHIND = 12 * 2**20
"""Bytes that a reader may be behind. What was written longer ago has left the cores' caches, and to read it from memory
while more is written slows both sides down: it waits for the end."""

READER_S = 0.05
"""How long a writer waits for the first reader, for the same reason."""

_RECORD = struct.Struct(f"<8sQ{MAX_VERSION_BYTES}s32sQ")
_MAGIC = b"agentlp2"
_READERS_AT = _RECORD.size - 8
_DONE = 2**64 - 1
_FAILED = 2**64 - 2


class StalledError(Exception):
    """The writer of a shared file has given up, or does not go on."""


class Progress:
    """The `progress` record of a folder: one writer, any number of readers.

    Fields are written in an order that makes a torn look harmless; a reader on a machine that reorders stores finds
    another digest than the writer's.
    """

    def __init__(self, folder: Path, *, create: bool = False) -> None:
        flags = os.O_RDWR | (os.O_CREAT if create else 0)
        descriptor = os.open(folder / PROGRESS, flags, 0o600)
        try:
            if create:
                os.ftruncate(descriptor, _RECORD.size)
            self._map = mmap.mmap(descriptor, _RECORD.size)
        finally:
            os.close(descriptor)

    def begin(self, version: str) -> None:
        """The file will hold `version`; nothing of it is complete."""
        self._put(0, b"", b"")
        self._put(0, version.encode(), b"")

    def reach(self, offset: int) -> None:
        """The file's bytes up to `offset` are complete."""
        struct.pack_into("<Q", self._map, 8, offset)

    def finish(self, checksum: str) -> None:
        """The whole file is, and this is its checksum."""
        _, version, _ = self.read()
        self._put(self.read()[0], version.encode(), checksum.encode())
        self.reach(_DONE)

    def fail(self) -> None:
        """The file will not be completed."""
        self.reach(_FAILED)

    def follow(self) -> None:
        """A reader is there."""
        struct.pack_into("<Q", self._map, _READERS_AT, 1)

    def wait_for_reader(self, timeout_s: float) -> bool:
        """Return when a reader is there since `begin`, or after `timeout_s`; says which."""
        end = time.monotonic() + timeout_s
        while not struct.unpack_from("<Q", self._map, _READERS_AT)[0]:
            if time.monotonic() >= end:
                return False
            time.sleep(POLL_S)
        return True

    def read(self) -> tuple[int, str, str]:
        """Bytes that are complete, version, checksum (empty until the end)."""
        magic, offset, version, checksum, _ = _RECORD.unpack(self._map[:])
        if magic != _MAGIC:
            return 0, "", ""
        return offset, version.rstrip(b"\0").decode(errors="replace"), checksum.rstrip(b"\0").decode(errors="replace")

    def _put(self, offset: int, version: bytes, checksum: bytes) -> None:
        self._map[:] = _RECORD.pack(_MAGIC, offset, version, checksum, 0)


class SharedReader:
    """The tensors of one folder, version after version; the mapping outlives them.

    `data` is the whole file as flat uint8; writing to it would change a private copy.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = np.empty(0, np.uint8)
        self.specs: list[TensorSpec] = []
        self._identity: tuple[int, ...] = ()

    def follow(self, version: str, stalled_s: float) -> Iterator[tuple[TensorSpec, np.ndarray]]:
        """The tensors piece by piece (flat uint8, whole elements), each piece when it is complete: in the file's order,
        but for tensors that the writer has left behind when it is their turn. These come at the end. A folder without
        `progress` is complete.

        Args:
            version: the one that the file has to hold.
            stalled_s: how long the writer may stand still.

        Raises:
            StalledError: the writer stood still, gave up, or writes another version.
            LayoutError: it is no safetensors file.
            OSError: it cannot be read.
        """
        progress = Progress(self.folder) if (self.folder / PROGRESS).exists() else None
        _await(self.folder, progress, version, 1, stalled_s)
        self._open()
        if progress is not None:
            progress.follow()
        late: list[tuple[TensorSpec, int]] = []

        def in_order() -> Iterator[tuple[TensorSpec, int]]:
            for spec in self.specs:
                complete = _await(self.folder, progress, version, 1, stalled_s)
                if complete - spec.begin > BEHIND and complete < _FAILED:
                    late.append((spec, complete))
                else:
                    yield spec, complete

        for spec, complete in itertools.chain(in_order(), late):
            for begin in range(spec.begin, spec.end, PROGRESS_BYTES) or (spec.begin,):
                end = min(begin + PROGRESS_BYTES, spec.end)
                if complete < end:
                    complete = _await(self.folder, progress, version, end, stalled_s)
                yield spec, self.data[begin:end]
        if progress is not None:
            _await(self.folder, progress, version, _DONE, stalled_s)

    def checksum(self) -> str | None:
        """What the writer says of the version in the file; None where no writer says anything."""
        return Progress(self.folder).read()[2] if (self.folder / PROGRESS).exists() else None

    def _open(self) -> None:
        """Map the file, unless it is mapped already."""
        path = self.folder / WEIGHTS
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            identity = (stat.st_dev, stat.st_ino, stat.st_size)
            specs = read_layout(path)
            if identity != self._identity or specs != self.specs:
                # Private: nothing that happens to the model here reaches the file. Pages that are only read are shared.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                _prefer_large_pages(mapped)
                self.data = np.frombuffer(mapped, np.uint8)
                self.specs, self._identity = specs, identity


class SharedWriter:
    """Writes versions to one folder, over the one before.

    `data` is the file as flat uint8, after `open`.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.data = np.empty(0, np.uint8)
        self.progress = Progress(folder, create=True)
        self._header = b""

    def open(self, header: bytes, size: int) -> None:
        """Make room for a file of `size` bytes that begins with `header`; pages of an earlier version are used again.

        Raises:
            OSError: there is no room.
        """
        path = self.folder / WEIGHTS
        if header != self._header or len(self.data) != size or not path.exists():
            # A new file: whoever has mapped an old one of another size keeps it.
            path.unlink(missing_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size)  # a full tmpfs is an error here, not a signal later
                mapped = mmap.mmap(descriptor, size)
            finally:
                os.close(descriptor)
            _prefer_large_pages(mapped)
            self.data = np.frombuffer(mapped, np.uint8)
            self.data[: len(header)] = np.frombuffer(header, np.uint8)
            self._header = header
        self.progress.reach(len(header))


def _prefer_large_pages(mapped: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            mapped.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            return  # a kernel without them


def await_shared(folder: Path, version: str, stalled_s: float) -> None:
    """Return when the file of `folder` holds the whole of `version`.

    Raises:
        StalledError: as `SharedReader.follow`.
    """
    if (folder / PROGRESS).exists():
        progress = Progress(folder)
        _await(folder, progress, version, 0, stalled_s)
        progress.follow()  # the writer need not wait
        _await(folder, progress, version, _DONE, stalled_s)


def _await(folder: Path, progress: Progress | None, version: str, offset: int, stalled_s: float) -> int:
    if progress is None:
        return _DONE
    seen, since = -1, time.monotonic()
    while True:
        complete, written, _ = progress.read()
        if complete == _FAILED:
            raise StalledError(f"the writer of {folder} has given up version {written}")
        if written == version and complete >= offset:
            return complete
        if complete != seen:
            seen, since = complete, time.monotonic()
        elif time.monotonic() - since > stalled_s:
            raise StalledError(
                f"{folder} holds version {written or '(none)'}, of which {complete} bytes are complete; "
                f"version {version} did not come within {stalled_s:g} s"
            )
        time.sleep(POLL_S)
