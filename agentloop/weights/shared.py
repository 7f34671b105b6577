"""A weights file in shared memory that is read while it is being written. No torch.

A published version is a folder with `model.safetensors`, which any loader of weights can read, and
`progress`, which records the version in the file and how much of it is complete. The trainer has
two such folders and writes them in turn: it overwrites existing pages, which is many times faster
than making new ones, and the version that is served stays untouched.
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
"""Bytes between two progress reports: few enough that readers find them in the cores' caches."""

STALLED_S = 30.0
"""A writer that makes no progress for this long is considered dead."""

BEHIND = 12 * 2**20
"""Bytes that a reader may lag behind the writer. Older bytes have left the cores' caches; reading
them from memory while more is written slows both sides down, so they are read at the end."""

READER_S = 0.05
"""Maximum time that a writer waits for the first reader to start, for the same reason."""

_RECORD = struct.Struct(f"<8sQ{MAX_VERSION_BYTES}s32sQ")
_MAGIC = b"agentlp2"
_READERS_AT = _RECORD.size - 8
_DONE = 2**64 - 1
_FAILED = 2**64 - 2


class StalledError(Exception):
    """The writer of a shared file has given up, or makes no progress."""


class Progress:
    """The `progress` record of a folder: one writer, any number of readers.

    Fields are written in an order that makes a torn read harmless. On a machine that reorders
    stores, a reader may see bytes too early; it then finds another checksum than the writer's.
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
        """Announce that the file will hold `version`, of which nothing is complete."""
        # Empty first: no reader may see the new version with the old offset.
        self._put(0, b"", b"")
        self._put(0, version.encode(), b"")

    def reach(self, offset: int) -> None:
        """Report that the bytes up to `offset` are complete."""
        struct.pack_into("<Q", self._map, 8, offset)

    def finish(self, checksum: str) -> None:
        """Report that the file is complete, with its checksum."""
        offset, version, _ = self.read()
        # The checksum first: a reader that sees the end must find it.
        self._put(offset, version.encode(), checksum.encode())
        self.reach(_DONE)

    def fail(self) -> None:
        """Report that the file will not be completed."""
        self.reach(_FAILED)

    def follow(self) -> None:
        """Report that a reader has started."""
        struct.pack_into("<Q", self._map, _READERS_AT, 1)

    def wait_for_reader(self, timeout_s: float) -> bool:
        """Wait until a reader has started since `begin`; return False after `timeout_s`."""
        end = time.monotonic() + timeout_s
        while not struct.unpack_from("<Q", self._map, _READERS_AT)[0]:
            if time.monotonic() >= end:
                return False
            time.sleep(POLL_S)
        return True

    def read(self) -> tuple[int, str, str]:
        """Return the number of complete bytes, the version, and its checksum (empty until the
        end)."""
        magic, offset, version, checksum, _ = _RECORD.unpack(self._map[:])
        if magic != _MAGIC:
            return 0, "", ""
        return offset, version.rstrip(b"\0").decode(errors="replace"), checksum.rstrip(b"\0").decode(errors="replace")

    def _put(self, offset: int, version: bytes, checksum: bytes) -> None:
        self._map[:] = _RECORD.pack(_MAGIC, offset, version, checksum, 0)


class SharedReader:
    """Reads the tensors of one folder, version after version, through a mapping that stays.

    Attributes:
        data: the whole file as flat uint8. Writing to it would change a private copy.
        specs: the tensors in the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = np.empty(0, np.uint8)
        self.specs: list[TensorSpec] = []
        self._identity: tuple[int, ...] = ()

    def follow(self, version: str, stalled_s: float) -> Iterator[tuple[TensorSpec, np.ndarray]]:
        """Yield the tensors in chunks (flat uint8, whole elements), as the writer completes them.

        Tensors come in the order of the file, except those that the writer has left more than
        `BEHIND` bytes behind when it is their turn: these come at the end. A folder without
        `progress` is complete.

        Args:
            version: the version to read.
            stalled_s: how long the writer may make no progress.

        Raises:
            StalledError: the writer made no progress, gave up, or writes another version.
            LayoutError: it is not a safetensors file.
            OSError: it cannot be read.
        """
        # Wait for the first byte before mapping: until then the file may be missing or another one.
        progress = Progress(self.folder) if (self.folder / PROGRESS).exists() else None
        _await(self.folder, progress, version, 1, stalled_s)
        self._open()
        if progress is not None:
            # The writer may be waiting for this before it writes the tensors.
            progress.follow()

        late: list[tuple[TensorSpec, int]] = []

        def in_order() -> Iterator[tuple[TensorSpec, int]]:
            for spec in self.specs:
                # Ask again for each tensor: the writer advances while the caller consumes chunks.
                complete = _await(self.folder, progress, version, 1, stalled_s)
                if complete - spec.begin > BEHIND and complete < _FAILED:
                    late.append((spec, complete))
                else:
                    yield spec, complete

        # `late` is filled while `in_order` runs, and read only after it has ended.
        for spec, complete in itertools.chain(in_order(), late):
            for begin in range(spec.begin, spec.end, PROGRESS_BYTES) or (spec.begin,):
                end = min(begin + PROGRESS_BYTES, spec.end)
                if complete < end:
                    complete = _await(self.folder, progress, version, end, stalled_s)
                yield spec, self.data[begin:end]

        # Last, so that the writer's checksum is there, and a failure after the last byte is
        # noticed.
        if progress is not None:
            _await(self.folder, progress, version, _DONE, stalled_s)

    def checksum(self) -> str | None:
        """Return the writer's checksum of the version in the file; None without `progress`."""
        return Progress(self.folder).read()[2] if (self.folder / PROGRESS).exists() else None

    def _open(self) -> None:
        """Map the file, unless the same file is mapped already."""
        path = self.folder / WEIGHTS
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            identity = (stat.st_dev, stat.st_ino, stat.st_size)
            specs = read_layout(path)
            if identity != self._identity or specs != self.specs:
                # Private: writes to the model do not reach the file. Pages that are only read are
                # shared.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                _prefer_large_pages(mapped)
                self.data = np.frombuffer(mapped, np.uint8)
                self.specs, self._identity = specs, identity


class SharedWriter:
    """Writes versions to one folder, each over the one before.

    Attributes:
        data: the file as flat uint8, after `open`.
        progress: the record that readers follow.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.data = np.empty(0, np.uint8)
        self.progress = Progress(folder, create=True)
        self._header = b""

    def open(self, header: bytes, size: int) -> None:
        """Make room for a file of `size` bytes that begins with `header`; reuse pages if possible.

        Raises:
            OSError: there is not enough room.
        """
        path = self.folder / WEIGHTS
        if header != self._header or len(self.data) != size or not path.exists():
            # A new file: readers that have mapped an old one of another size keep it.
            path.unlink(missing_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size)  # so that a full tmpfs is an error here, not a SIGBUS later
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
            return  # the kernel does not support them


def await_shared(folder: Path, version: str, stalled_s: float) -> None:
    """Wait until the file of `folder` holds all of `version`.

    Raises:
        StalledError: as `SharedReader.follow`.
    """
    if (folder / PROGRESS).exists():
        progress = Progress(folder)
        _await(folder, progress, version, 0, stalled_s)
        progress.follow()  # so that the writer does not wait for a reader
        _await(folder, progress, version, _DONE, stalled_s)


def _await(folder: Path, progress: Progress | None, version: str, offset: int, stalled_s: float) -> int:
    """Wait until `version` is complete up to `offset`; return how far it is."""
    if progress is None:
        return _DONE
    seen, since = -1, time.monotonic()
    while True:
        complete, written, _ = progress.read()
        if complete == _FAILED:
            raise StalledError(f"the writer of {folder} abandoned version {written}")
        if written == version and complete >= offset:
            return complete

        if complete != seen:
            seen, since = complete, time.monotonic()
        elif time.monotonic() - since > stalled_s:
            raise StalledError(
                f"{folder} holds version {written or '(none)'}, of which {complete} bytes are complete; "
                f"the writer made no progress towards version {version} for {stalled_s:g} s"
            )
        time.sleep(POLL_S)
