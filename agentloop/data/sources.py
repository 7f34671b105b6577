"""Where rows come from: files, globs and folders of them, the hub, functions and dataset classes.

A source is opened, not read: jsonl is read line by line where it lies, large parquet files are unpacked into a memory
map, data sets of the hub are memory maps already. So 50,000 rows with images need no memory of their own.
"""

from __future__ import annotations

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
import orjson

from agentloop.data.hub import HUB, open_hub, open_saved, was_saved
from agentloop.errors import DataError, UserError
from agentloop.imports import is_file_reference, load_from_file
from agentloop.registry import DATASETS, load, registered

IN_MEMORY_BYTES = 256 * 2**20
"""Parquet files of a split that unpack to no more than this together are held in memory."""

BATCH_ROWS = 1024
SCAN_BYTES = 8 * 2**20

SPELLINGS = (
    "give .jsonl or .parquet files, a folder or glob of them, hub:owner/name, path.py:function, "
    "or a name registered in agentloop.datasets"
)


class Source(Protocol):
    """Rows of one origin, numbered from 0.

    Attributes:
        name: of the origin, for messages.
        folder: that relative image paths are relative to.
        fills_nulls: keys that only other rows have are there, and null: columns have one shape.
    """

    name: str
    folder: Path
    fills_nulls: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...

    def number(self, index: int) -> int:
        """The row's number for people: from 1, blank lines of a file counted."""
        ...


class Rows:
    """The rows of all sources of a split, one behind the other."""

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
        """A row as a message names it: `file, row N`."""
        source, local = self._find(index)
        return f"{source.name}, row {source.number(local)}"

    def folder(self, index: int) -> Path:
        return self._find(index)[0].folder

    def fills_nulls(self, index: int) -> bool:
        """Whether nulls of this row may stand for keys that only other rows have."""
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
    """Open what `data.train` or `data.val` names.

    Args:
        source: one or several of: `.jsonl` and `.parquet` files, globs and folders of them, folders saved by
            `datasets`, `hub:owner/name[:config][@split]`, `path.py:name`, names registered in `agentloop.datasets`.
        key: the config key, for messages; it also says which split of a data set is meant.
        options: keyword arguments for functions and dataset classes.
        in_memory: bytes of unpacked parquet that are held in memory; what is beyond is unpacked into a file.
        scratch: folder of that file; None: the system's for temporary files. It has no name there, and is gone with
            the process.

    Raises:
        DataError: naming what cannot be opened.
        ConfigError: the file of a `path.py:name`, or the name in it, is not there.
        RegistryError: a registered data set cannot be loaded.
    """
    opened: list[Source] = []
    budget = _Budget(in_memory, scratch)
    for name in [source] if isinstance(source, str) else source:
        opened += _open(name, key, options or {}, budget)
    rows = Rows(opened)
    if not len(rows):
        raise DataError(f"{key}: {source} holds no rows", "give a file with at least one row")
    return rows


def _open(name: str, key: str, options: Mapping[str, Any], budget: _Budget) -> Iterator[Source]:
    if is_file_reference(name):
        yield MadeRows(name, load_from_file(name, key), options, key)
        return
    if name.startswith(HUB):
        yield ArrowRows(name, Path(), open_hub(name, key))
        return
    path = Path(name)
    if path.is_dir() and was_saved(path):
        yield ArrowRows(name, path, open_saved(path, key))
    elif path.is_dir() or re.search(r"[*?\[]", name):
        for file in _shards(path, key):
            yield _open_file(file, key, budget)
    elif path.exists() or path.suffix or path.name != name:
        yield _open_file(path, key, budget)
    elif name in registered(DATASETS):
        yield MadeRows(name, load(DATASETS, name), options, key)
    else:
        known = ", ".join(registered(DATASETS)) or "none"
        raise DataError(f"{key}: {name} does not exist, and is not registered ({known} is)", SPELLINGS)


def _shards(path: Path, key: str) -> list[Path]:
    """The files that a folder holds, or a glob matches, by name."""
    if path.is_dir():
        found = [file for file in path.iterdir() if file.suffix in (".parquet", ".jsonl")]
    else:
        base = Path(path.anchor)
        found = [file for file in base.glob(str(path.relative_to(base))) if file.is_file()]
    if not found:
        raise DataError(f"{key}: {path} holds no .parquet and no .jsonl file", SPELLINGS)
    if len({file.suffix for file in found}) > 1:
        raise DataError(f"{key}: {path} holds files of several kinds", "name those that are meant, e.g. rows/*.parquet")
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
    """One JSON object a line, parsed when it is asked for. 16 bytes of memory a row."""

    fills_nulls = False

    def __init__(self, path: Path, scan_bytes: int = SCAN_BYTES) -> None:
        self.name = str(path)
        self.folder = path.parent
        self._file = path.open("rb", buffering=0)
        self._begins, self._lines = _lines_of(self._file.fileno(), scan_bytes)
        self._size = os.fstat(self._file.fileno()).st_size

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> Any:
        # A read, not a memory map: a file that somebody cuts short must not kill the process.
        begin = int(self._begins[index])
        end = int(self._begins[index + 1]) if index + 1 < len(self._begins) else self._size
        line = os.pread(self._file.fileno(), end - begin, begin)
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError as exc:
            raise DataError(
                f"{self.name}, row {self.number(index)} is not valid JSON: {exc}", "mend or remove that line"
            ) from exc

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def number(self, index: int) -> int:
        return int(self._lines[index])


def _lines_of(file: int, scan_bytes: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Where the lines of a file that are not blank begin, and their numbers from 1."""
    breaks = []
    position = 0
    while block := os.pread(file, scan_bytes, position):
        breaks.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + position)
        position += len(block)
    ends = np.concatenate([*breaks, [position]]).astype(np.int64)
    begins = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    filled = ends > begins
    for index in np.flatnonzero((ends - begins < 16) & filled):  # short ones may be white space alone
        filled[index] = bool(os.pread(file, int(ends[index] - begins[index]), int(begins[index])).strip())
    return begins[filled], np.flatnonzero(filled) + 1


class ArrowRows:
    """Rows in Arrow's columns; a row becomes Python objects when it is asked for."""

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
        return self._batches[place].slice(index - self._starts[place], 1).to_pylist()[0]

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            for begin in range(0, batch.num_rows, BATCH_ROWS):
                yield from batch.slice(begin, BATCH_ROWS).to_pylist()

    def number(self, index: int) -> int:
        return index + 1


class _Budget:
    """How much of a split may still be held in memory, and where the rest goes."""

    def __init__(self, size: int, scratch: Path | None) -> None:
        self._left = size
        self.scratch = scratch

    def allows(self, size: int) -> bool:
        if size > self._left:
            return False
        self._left -= size
        return True


def _read_parquet(path: Path, budget: _Budget) -> list[Any]:
    """The record batches of a parquet file, in memory, or in a memory map of a temporary file that has no name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            metadata = file.metadata
            size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
            if budget.allows(size):
                return file.read().to_batches()  # type: ignore[no-any-return]
            with tempfile.NamedTemporaryFile(prefix="agentloop-rows-", dir=budget.scratch) as unpacked:
                with pa.ipc.new_file(unpacked.name, file.schema_arrow) as writer:
                    for batch in file.iter_batches(batch_size=BATCH_ROWS):
                        writer.write_batch(batch)
                reader = pa.ipc.open_file(pa.memory_map(unpacked.name))
                return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (OSError, ValueError) as exc:
        raise DataError(f"{path} cannot be read as parquet: {exc}", "write it again with pyarrow or pandas") from exc


class MadeRows:
    """Rows that user code makes: of `__len__` and `__getitem__`, asked when they are needed; of any iterable, kept."""

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
                    f"{key}: {name} gave {type(made).__name__}, which holds no rows",
                    "return an iterable of rows, or an object with __len__ and __getitem__",
                )
            self._length = len(self._rows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        with _named_errors(f"{self.name}, row {index + 1}"):
            return self._rows[index]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(self._length))

    def number(self, index: int) -> int:
        return index + 1


@contextlib.contextmanager
def _named_errors(where: str) -> Iterator[None]:
    """Whatever user code raises becomes a `DataError` that says where."""
    try:
        yield
    except UserError:
        raise
    except Exception as exc:
        raise DataError(f"{where} raised {type(exc).__name__}: {exc}", "mend that code") from exc
