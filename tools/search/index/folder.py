"""Open the folder of a finished index, or published files as they are."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ValidationError

from agentloop.errors import ConfigError, DataError
from agentloop.files import read_json_leniently
from tools.search.corpus import Corpus, fingerprint, open_corpus
from tools.search.index.base import Index
from tools.search.index.building import FORMAT, MANIFEST, OFFSETS, checksum

CHECKED_BYTES = 2**30
"""Larger files are checked by their size alone, unless `verify`: 60 GB take minutes to read."""


class _File(BaseModel):
    bytes: int
    xxh3: str


class _CorpusFile(BaseModel):
    path: str
    bytes: int
    digest: str


class _Manifest(BaseModel):
    """What is read of a manifest."""

    kind: Literal["bm25", "dense"]
    options: dict[str, Any]
    corpus: _CorpusFile
    files: dict[str, _File]


class _DenseBuilt(BaseModel):
    index: Literal["flat", "ivf", "hnsw"]
    encoder: str
    size: int
    pooling: str | None
    prefixes: list[str]


@dataclass
class Opened:
    """An index, its corpus, and its kind for messages and metrics."""

    index: Index
    corpus: Corpus
    kind: str


@dataclass(frozen=True)
class DenseOptions:
    """How an index of vectors is used.

    Attributes:
        encoder: folder or hub id; None: the one that the index was built with.
        pooling: `mean` or `cls`; None: as the encoder's folder says.
        device: of the encoder.
        gpu: keep the vectors on the GPUs.
        nprobe: lists that an IVF index searches; None: as it was built.
        ef_search: candidates that an HNSW index keeps; None: as it was built.
    """

    encoder: str | None = None
    pooling: str | None = None
    device: str = "cpu"
    gpu: bool = False
    nprobe: int | None = None
    ef_search: int | None = None


OPTIONS = tuple(field.name for field in fields(DenseOptions))


def open_folder(
    folder: Path, *, corpus: Path | None = None, verify: bool = False, dense: DenseOptions | None = None
) -> Opened:
    """Open an index that `agentloop search index` built.

    Args:
        corpus: where its corpus is, if it has moved.
        verify: check every byte, not only those of files up to 1 GiB.

    Raises:
        ConfigError: the folder is not an index, a library is missing, or an option has no effect.
        DataError: the index is damaged, or belongs to another corpus.
    """
    options = dense or DenseOptions()
    manifest = _manifest(folder)
    for name, known in manifest["files"].items():
        file = folder / Path(name).name
        if not file.is_file() or file.stat().st_size != known["bytes"]:
            raise DataError(f"{file} is missing or has another size than when it was built", "build the index again")
        if (verify or known["bytes"] <= CHECKED_BYTES) and checksum(file) != known["xxh3"]:
            raise DataError(f"{file} is damaged: its checksum differs", "build the index again")

    path = _corpus_path(folder, manifest, corpus)
    if fingerprint(path) != {key: manifest["corpus"][key] for key in ("bytes", "digest")}:
        raise DataError(
            f"{path} is not the corpus that {folder} was built from, or has changed since",
            "give the right file with --corpus, or build the index again",
        )
    offsets = np.load(folder / OFFSETS, mmap_mode="r", allow_pickle=False)
    passages = Corpus(path, offsets)  # from here on it notices changes; an index may take minutes to open

    index: Index
    if manifest["kind"] == "bm25":
        refuse_options(options, OPTIONS, f"{folder} is an index of bm25, which has no vectors")
        from tools.search.index.bm25 import Bm25Index

        index = Bm25Index(folder)
    else:
        from tools.search.index.dense import open_dense

        index = open_dense(folder, manifest, options)
    if index.passages != len(offsets) - 1:
        raise DataError(f"{folder} has {index.passages} entries for {len(offsets) - 1} passages", "build it again")
    return Opened(index, passages, manifest["kind"])


def open_published(index_file: Path, corpus: Path | None, dense: DenseOptions) -> Opened:
    """Open a faiss file and a corpus that others have made, such as `e5_Flat.index` and
    `wiki-18.jsonl`.

    Raises:
        ConfigError: the corpus or the encoder is missing, or an option has no effect.
        DataError: a file cannot be read, or they do not belong together.
    """
    from tools.search.index.dense import open_faiss_file

    if _is_corpus(index_file):
        raise ConfigError(
            f"{index_file} is a corpus, not an index",
            f"build its index first: agentloop search index {index_file} --out DIR; then serve DIR",
        )
    if corpus is None:
        raise ConfigError(f"{index_file} is a faiss index without a corpus", "give the passages with --corpus FILE")
    if dense.encoder is None:
        raise ConfigError(
            f"{index_file} does not say which encoder made its vectors",
            "give it with --encoder, for instance intfloat/e5-base-v2 for e5_Flat.index",
        )
    index = open_faiss_file(index_file, dense)
    passages = open_corpus(corpus)
    if index.passages != len(passages):
        raise DataError(
            f"{index_file} has {index.passages:,} vectors, and {corpus} has {len(passages):,} passages",
            "give the corpus that the index was made from",
        )
    return Opened(index, passages, "dense")


def _is_corpus(file: Path) -> bool:
    """Return whether a file is one of passages, by its name or its first byte; one of faiss begins
    with a letter."""
    if file.suffix in (".jsonl", ".json", ".csv", ".tsv", ".txt"):
        return True
    with suppress(OSError), file.open("rb") as opened:
        return opened.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")
    return False


def refuse_options(options: DenseOptions, names: Iterable[str], reason: str) -> None:
    """Refuse options that would have no effect.

    Raises:
        ConfigError: one of `names` is given.
    """
    for name in names:
        if getattr(options, name) != getattr(DenseOptions(), name):
            raise ConfigError(f"--{name.replace('_', '-')} has no effect: {reason}", "leave it out")


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise ConfigError(f"{folder} is not an index", "build one with `agentloop search index CORPUS --out DIR`")
    manifest = read_json_leniently(file.read_bytes())
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ConfigError(f"{file} cannot be read, or is of another version", "build the index again")
    try:
        _Manifest.model_validate(manifest, strict=True)
        if manifest["kind"] == "dense":
            _DenseBuilt.model_validate(manifest["options"], strict=True)
    except ValidationError as exc:
        place = ".".join(map(str, exc.errors()[0]["loc"]))
        raise DataError(f"{file} is damaged: {place} is missing or wrong", "build the index again") from exc
    if OFFSETS not in manifest["files"]:
        raise DataError(f"{file} is damaged: it does not list {OFFSETS}", "build the index again")
    return manifest


def _corpus_path(folder: Path, manifest: dict[str, Any], given: Path | None) -> Path:
    recorded = Path(manifest["corpus"]["path"])
    candidates = [given] if given is not None else [recorded, folder / recorded.name, folder.parent / recorded.name]
    for path in candidates:
        if path.is_file():
            return path
    raise DataError(f"the corpus of {folder} is not at {candidates[0]}", "say where it is with --corpus")
