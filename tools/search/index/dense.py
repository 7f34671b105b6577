"""Dense indexes: the vectors of an encoder, compared by inner product.

    flat   every vector is compared: exact. The vectors are a file that is mapped into memory
    ivf    vectors in lists around centers, a few lists are searched: fast, less exact
    hnsw   a graph of neighbours: fastest, and the graph has to be in memory

`flat` is built in bounded memory; for `ivf` and `hnsw` faiss holds all vectors while it builds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from agentloop.errors import ConfigError, DataError, DiskError
from agentloop.files import free_space
from tools.search.encoder import Encoder, TextEncoder, Vectors
from tools.search.index.arrays import write_header, write_rows
from tools.search.index.base import Hits, library
from tools.search.index.building import Arrays, Parts, Progress
from tools.search.index.folder import DenseOptions, refuse_options

Kind = Literal["flat", "ivf", "hnsw"]

VECTORS, FAISS_FILE = "vectors.npy", "faiss.index"

TRAINING_PER_LIST = 64
HNSW_NEIGHBOURS, HNSW_EF = 32, 128

ROWS_AT_ONCE = 2**18
"""Vectors of a flat index that are compared in one call: the pages of a larger part would be read
and thrown away again where they do not fit into memory."""


class DenseBuilder:
    """Makes a dense index. See `building.Builder`.

    Args:
        encoder: makes the vectors of passages.
        name: of the encoder, for the manifest and for the server.
        lists: of `ivf`; None: four times the root of the number of passages.
    """

    kind = "dense"

    def __init__(self, encoder: TextEncoder, name: str, kind: Kind = "flat", lists: int | None = None) -> None:
        library("faiss")  # report that it is missing before hours of work
        self._encoder = encoder
        self._index, self._lists = kind, lists
        self.options: dict[str, Any] = {
            "index": kind,
            "lists": lists,
            "encoder": name,
            "size": encoder.size,
            "pooling": getattr(encoder, "pooling", None),
            "prefixes": list(getattr(encoder, "prefixes", ("", ""))),
        }

    def part(self, texts: list[str]) -> Arrays:
        vectors = self._encoder.encode(texts, query=False)
        wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(wrong):
            raise DataError(
                f"the encoder makes a vector that is not finite of the passage {texts[wrong[0]][:80]!r}",
                "use another --encoder, or --device cpu, which does not compute in half precision",
            )
        return {"vectors": vectors}

    def resume(self, arrays: Arrays) -> None:
        """Nothing is kept between parts."""

    def finish(self, parts: Parts, folder: Path, progress: Progress) -> dict[str, Any]:
        arrays = (arrays["vectors"] for _, arrays in parts.arrays())
        if self._index == "flat":
            with (folder / VECTORS).open("wb") as file:
                write_header(file, np.float32, (parts.passages, self._encoder.size))
                for number, vectors in enumerate(arrays, 1):
                    write_rows(file, vectors)
                    progress("writing vectors (parts)", number, len(parts.list))
            return {}

        index, details = self._empty(parts)
        for number, vectors in enumerate(arrays, 1):
            index.add(np.ascontiguousarray(vectors, np.float32))
            progress("adding vectors (parts)", number, len(parts.list))
        file_name = folder / FAISS_FILE
        try:
            library("faiss").write_index(index, str(file_name))
        except RuntimeError as exc:  # faiss's own error of a failed write
            raise DiskError(
                f"{file_name} could not be written{free_space(file_name)}", "free space on that disk, then repeat"
            ) from exc
        return details

    def _empty(self, parts: Parts) -> tuple[Any, dict[str, Any]]:
        """Return an index without vectors, trained if it needs that."""
        faiss = library("faiss")
        if self._index == "hnsw":
            index = faiss.IndexHNSWFlat(self._encoder.size, HNSW_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = index.hnsw.efSearch = HNSW_EF
            return index, {"ef_search": HNSW_EF}

        lists = min(self._lists or math.ceil(4 * math.sqrt(parts.passages)), parts.passages)
        share = min(1.0, TRAINING_PER_LIST * lists / parts.passages)
        random = np.random.default_rng(0)
        sample = np.concatenate([_some(arrays["vectors"], share, random) for _, arrays in parts.arrays()])
        quantizer = faiss.IndexFlatIP(self._encoder.size)
        index = faiss.IndexIVFFlat(quantizer, self._encoder.size, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # small corpora: no warning for each
        index.train(sample)
        index.nprobe = max(1, min(lists, 64))
        return index, {"lists": lists, "nprobe": int(index.nprobe)}


class VectorsIndex:
    """A flat index over a file of vectors, or over any array. See `base.Index`.

    Args:
        vectors: unit vectors, [passages, size].
    """

    def __init__(self, vectors: npt.NDArray[np.float32], encoder: TextEncoder) -> None:
        self._faiss = library("faiss")
        self._vectors, self._encoder = vectors, encoder

    @property
    def passages(self) -> int:
        return len(self._vectors)

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        vectors_QC = self._encoder.encode(queries, query=True)
        best = self._faiss.ResultHeap(len(queries), k, keep_max=True)
        for begin in range(0, len(self._vectors), ROWS_AT_ONCE):
            block = np.ascontiguousarray(self._vectors[begin : begin + ROWS_AT_ONCE])
            scores, numbers = self._faiss.knn(
                vectors_QC, block, min(k, len(block)), metric=self._faiss.METRIC_INNER_PRODUCT
            )
            best.add_result(scores, np.where(numbers < 0, -1, numbers + begin))
        best.finalize()
        return _hits(best.D, best.I)


class FaissIndex:
    """An index that faiss reads: our `ivf` and `hnsw`, and published files. See `base.Index`."""

    def __init__(self, index: Any, encoder: TextEncoder) -> None:
        if index.d != encoder.size:
            raise ConfigError(
                f"the index has vectors of {index.d} numbers, and the encoder makes {encoder.size}",
                "give --encoder the model that the index was made with",
            )
        self._index, self._encoder = index, encoder
        self._larger_is_better = index.metric_type == library("faiss").METRIC_INNER_PRODUCT

    @property
    def passages(self) -> int:
        return int(self._index.ntotal)

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        scores, numbers = self._index.search(self._encoder.encode(queries, query=True), min(k, self.passages))
        return _hits(scores if self._larger_is_better else -scores, numbers)


def open_dense(folder: Path, manifest: dict[str, Any], options: DenseOptions) -> VectorsIndex | FaissIndex:
    """Open the vectors in an index folder, with the encoder that made them."""
    built = manifest["options"]
    encoder = Encoder(
        options.encoder or built["encoder"],
        pooling=options.pooling or built["pooling"],
        device=options.device,
        prefixes=tuple(built["prefixes"]),
    )
    if encoder.size != built["size"]:
        raise ConfigError(
            f"{folder} has vectors of {built['size']} numbers, and the encoder makes {encoder.size}",
            f"give --encoder the model that the index was made with: {built['encoder']}",
        )
    if built["index"] == "flat":
        refuse_options(options, ("nprobe", "ef_search"), f"{folder} is a flat index, which compares all vectors")
    else:
        return open_faiss_file(folder / FAISS_FILE, options, encoder)
    vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
    if not options.gpu:
        return VectorsIndex(vectors, encoder)
    index = library("faiss").IndexFlatIP(encoder.size)
    for begin in range(0, len(vectors), ROWS_AT_ONCE):
        index.add(np.ascontiguousarray(vectors[begin : begin + ROWS_AT_ONCE]))
    return FaissIndex(_on_gpus(index), encoder)


def open_faiss_file(file: Path, options: DenseOptions, encoder: TextEncoder | None = None) -> FaissIndex:
    """Open a file of faiss, mapped into memory where its kind allows it.

    Raises:
        DataError: it is not a file that faiss reads.
        ConfigError: the encoder makes vectors of another size, `gpu` is not possible, or an option
            has no effect.
    """
    faiss = library("faiss")
    if not file.is_file():
        raise DataError(f"{file} does not exist", "give a file that faiss wrote")
    try:
        # A flat file is mapped by the one flag, the lists of an IVF index by the other.
        try:
            index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError:
            index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as exc:
        reason = str(exc).splitlines()[0][-200:]
        raise DataError(
            f"{file} cannot be read by faiss: {reason}", "give a file that faiss wrote, and is whole"
        ) from exc

    if not hasattr(index, "nprobe"):
        refuse_options(options, ("nprobe",), f"{file} is not an ivf index")
    elif options.nprobe is not None:
        index.nprobe = options.nprobe
    if not hasattr(index, "hnsw"):
        refuse_options(options, ("ef_search",), f"{file} is not an hnsw index")
    elif options.ef_search is not None:
        index.hnsw.efSearch = options.ef_search
    if options.gpu:
        index = _on_gpus(index)
    if encoder is None:
        assert options.encoder is not None  # checked where the command's options are read
        encoder = Encoder(options.encoder, pooling=options.pooling, device=options.device)
    return FaissIndex(index, encoder)


def _some(vectors: Vectors, share: float, random: np.random.Generator) -> Vectors:
    rows = random.choice(len(vectors), math.ceil(share * len(vectors)), replace=False)
    return np.asarray(vectors[np.sort(rows)])


def _on_gpus(index: Any) -> Any:
    faiss = library("faiss")
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        raise ConfigError(
            "--gpu needs a GPU and a faiss that was built for it; faiss-cpu is not",
            "install faiss-gpu-cu12 in place of faiss-cpu, or leave --gpu out",
        )
    return faiss.index_cpu_to_all_gpus(index)


def _hits(scores_QK: Vectors, numbers_QK: npt.NDArray[np.int64]) -> list[Hits]:
    """Return hits by query; faiss fills up with -1 where it finds too few.

    Vectors that are not finite have no place in an order: their passages are left out.
    """
    hits = []
    for scores, numbers in zip(scores_QK, numbers_QK, strict=True):
        found = (numbers >= 0) & np.isfinite(scores)
        hits.append(Hits(numbers[found].tolist(), scores[found].astype(float).tolist()))
    return hits
