"""`Corpus`: the passages of a JSON-lines file, read where they lie.

A line is `{"id": ..., "contents": "title\\ntext"}`, or has `title` and `text` instead of `contents`
(wiki-18.jsonl, the dumps of FlashRAG, a file of one's own). The file is never loaded: 14 GB of
passages cost the pages that are read. Nor is it mapped into memory, where a file that becomes
shorter ends the process with a signal.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import orjson

from agentloop.errors import DataError
from agentloop.files import open_atomic

log = logging.getLogger(__name__)

MOST_LINE = 16 * 2**20
"""Bytes of one passage; a longer line is not a passage, and would be held in memory."""

LEAST_LINE = 2

FORM = '{"id": .., "contents": "title\\ntext"}'

SAMPLES, SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True, slots=True)
class Line:
    """A passage as it stands in the file: its number, and the bytes from `start` to `end`."""

    number: int
    start: int
    end: int
    contents: str


def read_passage(data: bytes | memoryview, where: str) -> dict[str, Any]:
    """Return a line as a passage with a text `contents`; other keys stay as they are.

    Raises:
        DataError: it is not a JSON object with `contents`, or with `title` and `text`.
    """
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError as exc:
        # Its own line number is that within the passage, which is one line.
        raise DataError(
            f"{where} is not JSON: {exc.msg}, at column {exc.colno}", "correct or remove that line"
        ) from exc
    if not isinstance(found, dict):
        raise DataError(f"{where} is {type(found).__name__}, not a JSON object", f"write {FORM}")

    contents, text = found.get("contents"), found.get("text")
    if isinstance(contents, str):
        return found
    if contents is None and isinstance(text, str):
        return {**found, "contents": f"{found.get('title') or ''}\n{text}"}
    raise DataError(
        f"{where} has neither a text `contents` nor a text `text`",
        f'write {FORM}, or {{"id": .., "title": .., "text": ..}}',
    )


def read_lines(path: Path, number: int = 0, start: int = 0) -> Iterator[Line]:
    """Yield the passages of a file from byte `start`, which is passage `number`; blank lines are
    skipped.

    Raises:
        DataError: naming the file and the passage.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            position = start
            while raw := file.readline(MOST_LINE + 1):
                begin, position = position, position + len(raw)
                if len(raw) > MOST_LINE:
                    raise DataError(
                        f"{path}, line {_line_number(path, begin)} has more than {MOST_LINE:,} bytes",
                        "split it into passages of some hundred words, one a line",
                    )
                data = raw.removeprefix(b"\xef\xbb\xbf") if begin == 0 else raw
                if not data.strip():
                    continue
                try:
                    passage = read_passage(data.rstrip(), "it")
                except DataError as exc:
                    where = f"{path}, line {_line_number(path, begin)}"
                    # A file whose very first line is wrong is of another form: a JSON array, a CSV.
                    hint = exc.hint if number else f"write JSON lines: {FORM}, a line for each passage"
                    raise DataError(where + exc.message.removeprefix("it"), hint) from exc
                yield Line(number, position - len(data), position, passage["contents"])
                number += 1
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror or exc}", "give a JSON-lines file of passages") from exc


def _line_number(path: Path, begin: int) -> int:
    """Return the number, from 1 on, of the line that begins at a byte."""
    number = 1
    with path.open("rb") as file:
        while begin > 0 and (data := file.read(min(begin, 2**22))):
            number += data.count(b"\n")
            begin -= len(data)
    return number


def fingerprint(path: Path) -> dict[str, Any]:
    """Return what tells a file from another: its size, and a digest of samples spread over it.

    Reading 14 GB at each start would take longer than everything else.
    """
    with path.open("rb") as file:
        return _fingerprint(file.fileno())


def _fingerprint(fd: int) -> dict[str, Any]:
    size = os.fstat(fd).st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    for place in np.linspace(0, max(0, size - SAMPLE_BYTES), SAMPLES, dtype=np.int64):
        digest.update(os.pread(fd, SAMPLE_BYTES, int(place)))
    return {"bytes": size, "digest": digest.hexdigest()}


class Corpus:
    """The passages of a file by number.

    A file that another program changes is noticed by its size and the time of its last change. It
    is still good if its fingerprint is the one that it had when it was opened: it was only touched,
    or put back.

    Args:
        path: the JSON-lines file.
        offsets: bytes of each passage: `offsets[i]` to `offsets[i + 1]`, [N + 1].

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, path: Path, offsets: npt.NDArray[np.int64]) -> None:
        self.path = path
        self._offsets = offsets
        try:
            self._file = path.open("rb")
            self._fd = self._file.fileno()
            self._state = _state(self._fd)  # first: a change during the next line is noticed later
            self._fingerprint = _fingerprint(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        except OSError as exc:
            raise DataError(f"{path} cannot be read: {exc}", "give a JSON-lines file of passages") from exc
        self._changed: tuple[int, int] | None = None
        if len(offsets) < LEAST_LINE:
            raise DataError(f"{path} has no passage", "give a JSON-lines file of passages")
        if int(offsets[-1]) > self._fingerprint["bytes"]:
            raise DataError(f"{path} has fewer passages than its index", "build the index of this file again")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def raw(self, number: int) -> bytes:
        """Return the JSON of a passage as it stands in the file.

        Raises:
            DataError: the file has changed since it was opened, or cannot be read.
        """
        start, end = int(self._offsets[number]), int(self._offsets[number + 1])
        try:
            data = os.pread(self._fd, end - start, start)
        except OSError as exc:
            raise DataError(f"{self.path} cannot be read: {exc.strerror or exc}", "see to that disk") from exc
        self.check()  # after the read: whatever happened before it is seen
        if len(data) != end - start:
            raise self._has_changed()
        return data

    def check(self) -> None:
        """Check that the file is still the one that was opened.

        Raises:
            DataError: it has changed, or cannot be read.
        """
        try:
            state = _state(self._fd)
            if state == self._state:
                return
            if state != self._changed and _fingerprint(self._fd) == self._fingerprint:
                self._state, self._changed = state, None
                return
        except OSError as exc:
            raise DataError(f"{self.path} cannot be read: {exc.strerror or exc}", "see to that disk") from exc
        if state != self._changed:
            self._changed = state
            log.error("%s has changed while it was served: queries fail until it is as it was", self.path)
        raise self._has_changed()

    def _has_changed(self) -> DataError:
        return DataError(
            f"the corpus {self.path} has changed since its index was built",
            "put the file back as it was; or build the index again, and start the server with it",
        )

    def document(self, number: int) -> dict[str, Any]:
        """Return a passage.

        Raises:
            DataError: its line is not one, or the file has changed.
        """
        return read_passage(self.raw(number).strip().removeprefix(b"\xef\xbb\xbf"), f"{self.path}, passage {number}")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _state(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_size, found.st_mtime_ns


def open_corpus(path: Path) -> Corpus:
    """Open a file that has no index of ours: find its lines, and keep their places beside it.

    `<file>.offsets.npy` saves the next start from reading the whole file; without a right to write
    there, they are found anew.

    Raises:
        DataError: the file cannot be read, or has no line.
    """
    kept = path.with_name(f"{path.name}.offsets.npy")
    try:
        stat = path.stat()
        with suppress(OSError, ValueError, EOFError):
            if kept.stat().st_mtime_ns >= stat.st_mtime_ns:
                offsets = np.load(kept, mmap_mode="r", allow_pickle=False)
                if offsets.dtype == np.int64 and offsets.ndim == 1 and offsets[-1:] == stat.st_size:
                    return Corpus(path, offsets)
        offsets = _find_lines(path, stat.st_size)
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror or exc}", "give a JSON-lines file of passages") from exc
    with suppress(Exception), open_atomic(kept) as file:  # only saves time
        np.save(file, offsets)
    return Corpus(path, offsets)


def _find_lines(path: Path, size: int) -> npt.NDArray[np.int64]:
    """Return where the passages of a file begin, and its end, [N + 1]."""
    begins: list[npt.NDArray[np.int64]] = []
    block, position = 64 * 2**20, 0
    with path.open("rb") as file:
        while data := file.read(block):
            ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")).astype(np.int64)
            begins.append(ends + position + 1)
            position += len(data)
    offsets = np.concatenate([np.zeros(1, np.int64), *begins])
    if offsets[-1] != size:
        offsets = np.append(offsets, size)  # the last line has no line end
    # A blank line is one or two bytes; a passage has more, and takes the blank lines behind it.
    keep = np.diff(offsets) > LEAST_LINE
    return np.append(offsets[:-1][keep], size).astype(np.int64)
