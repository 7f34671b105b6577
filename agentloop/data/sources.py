"""Sources of rows: files, globs and folders, the hub, functions and dataset classes.

A source is opened, not read: jsonl lines are read from the file on demand, large parquet files are
unpacked into a memory map, data sets of the hub are memory maps already. So even 50,000 rows with
images take no memory.
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import os
import re
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from agentloop.data.hub import HUB, open_hub, open_saved, was_saved
from agentloop.errors import DataError, UserError
from agentloop.faults import place_of, user_frames
from agentloop.files import read_json
from agentloop.imports import is_file_reference
from agentloop.registry import DATASETS, load_reference, registered

IN_MEMORY_BYTES = 256 * 2**20
"""Unpacked size up to which the parquet files of a split are held in memory."""

BATCH_ROWS = 1024
SCAN_BYTES = 8 * 2**20

SPELLINGS = (
    "give .jsonl or .parquet files, a folder or glob of them, hub:owner/name, path.py:function, "
    "or a name registered in agentloop.datasets"
)


class Source(Protocol):
    """Rows of one origin, numbered from 0.

    Attributes:
        name: name of the origin, for messages.
        folder: base of relative image paths.
        fills_nulls: the format has columns of one shape, so that a key missing in a row appears as
            null.
    """

    name: str
    folder: Path
    fills_nulls: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...

    def place(self, index: int) -> str:
        """Return the row's name for messages, counted from 0: `row N`, with its line in a text."""
        ...


class Rows:
    """The rows of all sources of a split, concatenated."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = list(sources)
        self._starts = [0, *itertools.accumulate(len(source) for source in self._sources)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Any:
        source, local = self._find(index)
        return source[local]

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(self._sources)

    def where(self, index: int) -> str:
        """Return a row's name for messages: `file, row N`, counted from 0 in its file."""
        source, local = self._find(index)
        return f"{source.name}, {source.place(local)}"

    def folder(self, index: int) -> Path:
        return self._find(index)[0].folder

    def fills_nulls(self, index: int) -> bool:
        """Whether a null in this row may stand for a missing key."""
        return self._find(index)[0].fills_nulls

    def _find(self, index: int) -> tuple[Source, int]:
        place = bisect_right(self._starts, index) - 1
        return self._sources[place], index - self._starts[place]


def open_rows(
    source: str | Sequence[str],
    key: str,
    options: Mapping[str, Any] | None = None,
    *,
    in_memory: int = IN_MEMORY_BYTES,
    scratch: Path | None = None,
) -> Rows:
    """Open the rows that `data.train` or `data.val` names.

    Args:
        source: one or more of: `.jsonl` and `.parquet` files, globs and folders of them, folders
            saved by `datasets`, `hub:owner/name[:config][@split]`, `path.py:name`, names registered
            in `agentloop.datasets`.
        key: the config key, for messages; it also selects the default split of a data set.
        options: keyword arguments for functions and dataset classes.
        in_memory: bytes of unpacked parquet held in memory; the rest is unpacked into a file.
        scratch: folder of that file; None: the system's temporary folder. The file has no name and
            disappears with the process.

    Raises:
        DataError: a source cannot be opened; it is named.
        ConfigError: the file of a `path.py:name` is missing or does not define the name.
        RegistryError: a registered data set cannot be loaded.
    """
    opened: list[Source] = []
    budget = _Budget(in_memory, scratch)
    for name in [source] if isinstance(source, str) else source:
        opened += _open(name, key, options or {}, budget)
    rows = Rows(opened)
    if not len(rows):
        raise DataError(f"{key}: {source} has no rows", "give a file with at least one row")
    return rows


def _open(name: str, key: str, options: Mapping[str, Any], budget: _Budget) -> Iterator[Source]:
    # A registered name wins over a file or a folder of that name.
    if name in registered(DATASETS) or is_file_reference(name):
        yield MadeRows(name, load_reference(name, Path(), DATASETS, key=key, modules=False), options, key)
        return
    if name.startswith(HUB):
        yield ArrowRows(name, Path(), open_hub(name, key))
        return
    path = Path(name)
    if path.is_dir() and was_saved(path):
        yield ArrowRows(name, path, open_saved(path, key))
    elif path.is_file():  # before globs: `data[1].jsonl` may be a name
        yield _open_file(path, key, budget)
    elif path.is_dir() or re.search(r"[*?\[]", name):
        for file in _shards(path, key):
            yield _open_file(file, key, budget)
    elif path.suffix or path.name != name or path.exists():
        yield _open_file(path, key, budget)
    else:
        known = ", ".join(registered(DATASETS)) or "none"
        raise DataError(f"{key}: {name} does not exist and is not registered (registered: {known})", SPELLINGS)


def _shards(path: Path, key: str) -> list[Path]:
    """Return the files of a folder or glob, sorted by name."""
    if path.is_dir():
        found = [file for file in path.iterdir() if file.suffix in (".parquet", ".jsonl")]
    else:
        # Folders that exist are names, whatever characters they have; only the rest is a pattern.
        base = next(folder for folder in path.parents if folder.is_dir() or folder == Path(path.anchor))
        found = [file for file in base.glob(str(path.relative_to(base))) if file.is_file()]
    if not found:
        raise DataError(f"{key}: {path} has no .parquet or .jsonl file", SPELLINGS)
    if len({file.suffix for file in found}) > 1:
        raise DataError(f"{key}: {path} has files of both kinds", "name the ones to read, e.g. rows/*.parquet")
    return sorted(found)


def _open_file(path: Path, key: str, budget: _Budget) -> Source:
    if not path.is_file():
        raise DataError(f"{key}: {path} does not exist", SPELLINGS)
    if path.suffix == ".jsonl":
        return JsonlRows(path)
    if path.suffix == ".parquet":
        return ArrowRows(str(path), path.parent, _read_parquet(path, budget))
    raise DataError(f"{key}: {path} is neither .jsonl nor .parquet", "convert it to one of them")


class JsonlRows:
    """One JSON object per line, parsed on access. 16 bytes of memory per row."""

    fills_nulls = False

    def __init__(self, path: Path, scan_bytes: int = SCAN_BYTES) -> None:
        self.name = str(path)
        self.folder = path.parent
        self._file = path.open("rb", buffering=0)
        start = _start_of_text(self._file.fileno(), path)
        self._begins, self._lines = _lines_of(self._file.fileno(), scan_bytes, start)
        self._size = os.fstat(self._file.fileno()).st_size

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> Any:
        # A read, not a memory map: truncating the file meanwhile must not kill the process.
        begin = int(self._begins[index])
        end = int(self._begins[index + 1]) if index + 1 < len(self._begins) else self._size
        line = os.pread(self._file.fileno(), end - begin, begin)
        try:
            return read_json(line)
        except ValueError as exc:
            raise DataError(
                f"{self.name}, {self.place(index)} is not valid JSON: {exc}", "fix or remove that line"
            ) from exc

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def place(self, index: int) -> str:
        return f"row {index} (line {self._lines[index]})"  # blank lines have no row


MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""Marks at the start of files whose encoding is not read."""


def _start_of_text(file: int, path: Path) -> int:
    """Return the offset of the text: behind the mark that some programs put before UTF-8.

    Raises:
        DataError: the mark is that of another encoding.
    """
    head = os.pread(file, 4, 0)
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            raise DataError(f"{path} is encoded in {encoding}", "save it in UTF-8")
    return len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0


def _lines_of(file: int, scan_bytes: int, start: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the offsets of a file's non-blank lines from `start` on, and their numbers from 1."""
    breaks = []
    position = 0
    while block := os.pread(file, scan_bytes, position):
        breaks.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + position)
        position += len(block)

    ends = np.concatenate([*breaks, [position]]).astype(np.int64)
    begins = np.concatenate([[start], ends[:-1] + 1]).astype(np.int64)
    filled = ends > begins
    for index in np.flatnonzero((ends - begins < 16) & filled):  # short lines may be white space only
        filled[index] = bool(os.pread(file, int(ends[index] - begins[index]), int(begins[index])).strip())
    return begins[filled], np.flatnonzero(filled) + 1


class ArrowRows:
    """Rows in Arrow columns; a row becomes Python objects on access."""

    fills_nulls = True

    def __init__(self, name: str, folder: Path, batches: Sequence[Any]) -> None:
        self.name = name
        self.folder = folder
        self._batches = batches
        self._starts = [0, *itertools.accumulate(batch.num_rows for batch in batches)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Any:
        place = bisect_right(self._starts, index) - 1
        return self._read(self._batches[place], index - self._starts[place], 1, index)[0]

    def __iter__(self) -> Iterator[Any]:
        for start, batch in zip(self._starts, self._batches, strict=False):
            for begin in range(0, batch.num_rows, BATCH_ROWS):
                yield from self._read(batch, begin, min(BATCH_ROWS, batch.num_rows - begin), start + begin)

    def _read(self, batch: Any, begin: int, length: int, index: int) -> list[Any]:
        """Return some rows of a batch as Python objects; `index` is that of the first.

        Raises:
            DataError: Python has no object for a value, as for text that is not UTF-8.
        """
        try:
            return batch.slice(begin, length).to_pylist()  # type: ignore[no-any-return]  # pyarrow has no types
        except Exception as exc:
            if length == 1:
                fault = f"{self.name}, {self.place(index)} cannot be read: {type(exc).__name__}: {exc}"
                raise DataError(fault, "write the file again, with text in UTF-8") from exc
        return [self._read(batch, begin + i, 1, index + i)[0] for i in range(length)]

    def place(self, index: int) -> str:
        return f"row {index}"


class _Budget:
    """The part of a split that may still be held in memory, and the folder for the rest."""

    def __init__(self, size: int, scratch: Path | None) -> None:
        self._left = size
        self.scratch = scratch

    def allows(self, size: int) -> bool:
        if size > self._left:
            return False
        self._left -= size
        return True


def _read_parquet(path: Path, budget: _Budget) -> list[Any]:
    """Return a parquet file's record batches, in memory or in a map of an unnamed file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            metadata = file.metadata
            size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
            if budget.allows(size):
                return file.read().to_batches()  # type: ignore[no-any-return]  # pyarrow has no types

            # The name is deleted at the end of the block; the map keeps the bytes until the process
            # ends.
            with tempfile.NamedTemporaryFile(prefix="agentloop-rows-", dir=budget.scratch) as unpacked:
                with pa.ipc.new_file(unpacked.name, file.schema_arrow) as writer:
                    for batch in file.iter_batches(batch_size=BATCH_ROWS):
                        writer.write_batch(batch)
                reader = pa.ipc.open_file(pa.memory_map(unpacked.name))
                return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (OSError, ValueError, pa.ArrowException) as exc:
        raise DataError(f"{path} cannot be read as parquet: {exc}", "write it again with pyarrow or pandas") from exc


class MadeRows:
    """Rows of user code: made on access with `__len__` and `__getitem__`, else kept in a list."""

    fills_nulls = False

    def __init__(self, name: str, factory: Any, options: Mapping[str, Any], key: str) -> None:
        self.name = name
        self.folder = Path()
        with _named_errors(f"{key}: {name}"):
            made = factory(**options) if callable(factory) else factory
            if hasattr(made, "__len__") and hasattr(made, "__getitem__") and not isinstance(made, Mapping):
                self._rows: Any = made
            elif isinstance(made, Iterable) and not isinstance(made, str | bytes | Mapping):
                self._rows = list(made)
            else:
                raise DataError(
                    f"{key}: {name} returned {type(made).__name__}, which has no rows",
                    "return an iterable of rows, or an object with __len__ and __getitem__",
                )
            self._length = len(self._rows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        with _named_errors(f"{self.name}, {self.place(index)}"):
            return _plain(self._rows[index])

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(self._length))

    def place(self, index: int) -> str:
        return f"row {index}"


@contextlib.contextmanager
def _named_errors(where: str) -> Iterator[None]:
    """Turn any exception of user code into a `DataError` that names its place."""
    try:
        yield
    except UserError:
        raise
    except Exception as exc:
        place = place_of(user_frames(exc))
        hint = f"correct {place}" if place else "fix that code"
        raise DataError(f"{where} raised {type(exc).__name__}: {exc}", hint) from exc


def _plain(value: Any) -> Any:
    """Return a row with lists and numbers in place of numpy's, which pandas returns."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        plain = value.tolist()
        return plain if isinstance(plain, np.generic) else _plain(plain)  # a long double has no plain form
    return value
