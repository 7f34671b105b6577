"""Build an index: read the corpus in parts, keep each on disk, then put them together.

    .OUT.partial/parts/00000.*.npy   what the builder made of a part
    .OUT.partial/parts.jsonl         one line for each finished part, with its checksums
    .OUT.partial/index/              the index, while it is put together
    OUT/                             appears with one rename, when everything is in it

A build that was killed goes on after its last whole part, if corpus and options are the same. In
memory are one part, and what the builder keeps (the vocabulary).
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from agentloop.errors import ConfigError, DataError
from agentloop.files import (
    append_line,
    disk_errors,
    open_atomic,
    partial_of,
    read_json_leniently,
    read_json_lines,
    real_path,
    rename_folder,
    write_atomic,
)
from tools.search.corpus import Line, fingerprint, read_lines
from tools.search.index.arrays import save_array

PART_PASSAGES = 20_000
PART_CHARACTERS = 64_000_000
"""A part ends at either. A kill loses the work of one part at most."""

MANIFEST, OFFSETS = "manifest.json", "offsets.npy"
INDEX = "index"
"""Folder beside the parts in which the index is put together."""
FORMAT = 1

Arrays = dict[str, npt.NDArray[Any]]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and how much there is."""


class Builder(Protocol):
    """Makes one kind of index.

    Attributes:
        kind: names it in the manifest.
        options: what a resumed build must have in common with the one that it continues.
    """

    kind: str
    options: dict[str, Any]

    def part(self, texts: list[str]) -> Arrays:
        """Return what to keep of some passages, as arrays that numpy can save without pickle."""
        ...

    def resume(self, arrays: Arrays) -> None:
        """Take in a part that an earlier process made: called for each, in order, before `part`."""
        ...

    def finish(self, parts: Parts, folder: Path, progress: Progress) -> dict[str, Any]:
        """Write the index into `folder`; return what the manifest says about it."""
        ...


@dataclass(frozen=True)
class Part:
    """A finished part: `count` passages from number `first`, up to byte `end` of the corpus."""

    first: int
    count: int
    end: int
    files: dict[str, str]  # name -> checksum


class Parts:
    """The finished parts of a build, on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.list: list[Part] = []

    @property
    def passages(self) -> int:
        return self.list[-1].first + self.list[-1].count if self.list else 0

    @property
    def end(self) -> int:
        """The byte of the corpus where the next part begins."""
        return self.list[-1].end if self.list else 0

    def arrays(self) -> Iterator[tuple[Part, Arrays]]:
        """Yield each part with its arrays by name, mapped into memory."""
        for part in self.list:
            yield (
                part,
                {
                    name.split(".")[1]: np.load(self.folder / "parts" / name, mmap_mode="r", allow_pickle=False)
                    for name in part.files
                },
            )

    def add(self, count: int, end: int, arrays: Arrays) -> None:
        """Keep a part: its files first, then the line that says that they are whole."""
        number, files = len(self.list), {}
        for name, array in arrays.items():
            file = self.folder / "parts" / f"{number:05d}.{name}.npy"
            with open_atomic(file) as out:
                save_array(out, array)
            files[file.name] = checksum(file)
        part = Part(self.passages, count, end, files)
        append_line(self.folder / "parts.jsonl", orjson.dumps(asdict(part)))
        self.list.append(part)

    def recover(self) -> int:
        """Read the parts of an earlier build, up to the first damaged one; return their number."""
        journal = self.folder / "parts.jsonl"
        with suppress(FileNotFoundError, TypeError):
            for line in read_json_lines(journal):
                part = Part(**line)
                if part.first != self.passages or not all(map(self._whole, part.files, part.files.values())):
                    break
                self.list.append(part)
        write_atomic(journal, b"".join(orjson.dumps(asdict(part)) + b"\n" for part in self.list))
        return len(self.list)

    def _whole(self, name: str, digest: str) -> bool:
        file = self.folder / "parts" / Path(name).name
        return file.is_file() and checksum(file) == digest


def build_index(
    corpus: Path, out: Path, builder: Builder, *, force: bool = False, progress: Progress
) -> dict[str, Any]:
    """Build the index of a corpus into folder `out`, whole or not at all; return its manifest.

    Args:
        force: replace an index that is there.

    Raises:
        ConfigError: `out` exists, or another process builds it.
        DataError: a line of the corpus is not a passage, it has none, or it changed meanwhile.
        DiskError: the disk is full; the finished parts stay for the next attempt.
    """
    out = real_path(out)  # what a link names: the last step renames a folder, and cannot replace a link
    if not corpus.is_file():
        raise DataError(f"{corpus} is not a file", "give a JSON-lines file of passages")
    _check_target(out, force)

    partial = partial_of(out)
    try:
        with disk_errors(partial):
            partial.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"the folder {partial} cannot be made: {exc.strerror}", "choose another --out") from exc
    with _only_one(partial, out):
        _check_target(out, force)  # another process may have finished it meanwhile
        known = fingerprint(corpus)
        identity = {
            "format": FORMAT,
            "kind": builder.kind,
            "options": builder.options,
            "corpus": {"path": str(corpus.absolute()), **known},
        }
        parts = _begin(partial, identity, builder, progress)
        _read_parts(corpus, parts, builder, progress)
        if fingerprint(corpus) != known:
            raise DataError(f"{corpus} changed while its index was built", "build it again")

        made = _finish(parts, builder, identity, progress)
        # The parts last: killed before the index has its name, the build still has them.
        rename_folder(partial / INDEX, out)
        shutil.rmtree(partial)
    return made


def checksum(path: Path) -> str:
    """Return the xxh3 digest of a file: finds damage, not malice."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _check_target(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"{out} exists and is not an index", "choose another --out")
    if not force:
        raise ConfigError(f"{out} exists", "choose another --out, or replace it with --force")


@contextmanager
def _only_one(partial: Path, out: Path) -> Iterator[None]:
    """Hold the lock of a build. The kernel frees it when the process ends, however that happens.

    The file stays: if it were removed, two processes could hold locks of the same name.
    """
    with (partial.parent / f"{partial.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise ConfigError(f"another process builds {out}", "wait for it, or choose another --out") from exc
        partial.mkdir(exist_ok=True)
        yield


def _begin(partial: Path, identity: Mapping[str, Any], builder: Builder, progress: Progress) -> Parts:
    """Return the parts of an earlier build of the same index; none of another."""
    parts = Parts(partial)
    build = partial / "build.json"
    earlier = read_json_leniently(build.read_bytes()) if build.is_file() else None
    if earlier != orjson.loads(orjson.dumps(identity)):
        shutil.rmtree(partial)
        write_atomic(build, orjson.dumps(identity))

    shutil.rmtree(partial / INDEX, ignore_errors=True)  # the last step is repeated as a whole
    count = parts.recover()
    for number, (_, arrays) in enumerate(parts.arrays(), 1):
        builder.resume(arrays)
        progress("reading the parts of an earlier build", number, count)
    return parts


def _read_parts(corpus: Path, parts: Parts, builder: Builder, progress: Progress) -> None:
    size = corpus.stat().st_size
    lines: list[Line] = []
    characters = 0

    def keep() -> None:
        arrays = builder.part([line.contents for line in lines])
        begins = np.array([line.start for line in lines], np.int64)
        parts.add(len(lines), lines[-1].end, {"offsets": begins, **arrays})
        progress("reading passages (bytes)", lines[-1].end, size)
        lines.clear()

    for line in read_lines(corpus, parts.passages, parts.end):
        lines.append(line)
        characters += len(line.contents)
        if len(lines) >= PART_PASSAGES or characters >= PART_CHARACTERS:
            keep()
            characters = 0
    if lines:
        keep()
    if not parts.list:
        raise DataError(f"{corpus} has no passage", "give a JSON-lines file of passages")


def _finish(parts: Parts, builder: Builder, identity: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Write the index and its manifest into a folder beside the parts."""
    folder = parts.folder / INDEX
    with disk_errors(folder):
        folder.mkdir()
        begins = [np.asarray(arrays["offsets"]) for _, arrays in parts.arrays()]
        with (folder / OFFSETS).open("wb") as out:
            save_array(out, np.concatenate([*begins, np.array([parts.end])]))
        details = builder.finish(parts, folder, progress)

        files = {file.name: {"bytes": file.stat().st_size, "xxh3": checksum(file)} for file in sorted(folder.iterdir())}
        manifest = {**identity, "passages": parts.passages, "index": details, "files": files}
        write_atomic(folder / MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    return manifest
