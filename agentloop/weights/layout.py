"""Published tensors as bytes: their place in a file, and a checksum of their contents. No torch.

The file is safetensors: the header's length (eight bytes), the header (JSON), the tensors without
gaps. Files written here pad the header so that the tensors begin at a multiple of 64 bytes, and put
wider elements first, so that every tensor is aligned and can be used in place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

CHUNK = 2**19
"""Bytes that are copied, hashed and checked in one go, while they are in a core's cache."""

ALGORITHM = "xxh3"
"""Prefix of a checksum. Engines with another checksum function use another prefix."""

MAX_HEADER = 100 * 2**20
_ALIGNMENT = 64

CODES = {
    "float64": ("F64", 8), "int64": ("I64", 8), "uint64": ("U64", 8), "float32": ("F32", 4), "int32": ("I32", 4),
    "uint32": ("U32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "int16": ("I16", 2), "uint16": ("U16", 2),
    "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1),
}  # fmt: skip
"""By torch's name of a dtype: safetensors' name, and the bytes of an element."""

_NAMES = {code: name for name, (code, _) in CODES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a file: bytes `[begin, end)`, counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class LayoutError(ValueError):
    """A file is not a safetensors file, or is incomplete."""


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the size of a tensor in bytes; `dtype` is torch's name.

    Raises:
        LayoutError: the dtype cannot be published, or a dimension is negative.
    """
    if dtype not in CODES or any(size < 0 for size in shape):
        raise LayoutError(f"a tensor of dtype {dtype} and shape {list(shape)} cannot be published")
    return CODES[dtype][1] * math.prod(shape)


def plan_file(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> tuple[bytes, list[TensorSpec]]:
    """Plan a file for (name, dtype, shape) triples.

    Returns:
        its first bytes, header included, and the place of each tensor, in the order of the file.
    """
    # Widest elements first: then every tensor begins at a multiple of its element size.
    ordered = sorted(tensors, key=lambda tensor: -CODES[tensor[1]][1])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in ordered:
        size = tensor_bytes(dtype, shape)
        header[name] = {"dtype": CODES[dtype][0], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size

    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)

    start = 8 + len(text)
    specs = []
    for name, dtype, shape in ordered:
        begin, end = header[name]["data_offsets"]
        specs.append(TensorSpec(name, dtype, tuple(shape), start + begin, start + end))
    return len(text).to_bytes(8, "little") + text, specs


def read_layout(path: Path) -> list[TensorSpec]:
    """Return the tensors of a safetensors file in their order, with every offset checked.

    Raises:
        LayoutError: it is not a safetensors file, its size differs from its header, or tensors
            overlap.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise LayoutError(f"{path} cannot be read: it has no safetensors header")
        text = file.read(length)

    try:
        header = json.loads(text)
        _refuse_metadata(header.pop("__metadata__", {}))
        specs = [_spec(name, entry, 8 + length) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
        raise LayoutError(f"{path} cannot be read: its header is damaged: {exc!r}") from exc

    # In the order of the file, each tensor must begin where the one before it ends, up to the end.
    at = 8 + length
    specs.sort(key=lambda spec: (spec.begin, spec.end))
    for spec in specs:
        if spec.begin != at:
            raise LayoutError(f"{path} cannot be read: {spec.name!r} does not begin where the tensor before it ends")
        at = spec.end
    if at != size:
        raise LayoutError(f"{path} cannot be read: it holds {size} bytes, its header says {at}")
    return specs


def _spec(name: str, entry: dict[str, Any], start: int) -> TensorSpec:
    begin, end = (_integer(offset) for offset in entry["data_offsets"])
    shape = tuple(_integer(length) for length in entry["shape"])
    if entry["dtype"] not in _NAMES:
        raise ValueError(f"{name!r} has the dtype {entry['dtype']}, which is not supported")
    spec = TensorSpec(name, _NAMES[entry["dtype"]], shape, start + begin, start + end)
    if end - begin != tensor_bytes(spec.dtype, shape):
        raise ValueError(f"{name!r} has {end - begin} bytes, which do not fit its shape {list(shape)}")
    return spec


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is not an integer")
    return value


def _refuse_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TypeError("its metadata are not texts")


_BEYOND_FINITE = {
    "float64": (np.int64, 0x7FF0 << 48, np.uint64, 0xFFF0 << 48),
    "float32": (np.int32, 0x7F80_0000, np.uint32, 0xFF80_0000),
    "bfloat16": (np.int16, 0x7F80, np.uint16, 0xFF80), "float16": (np.int16, 0x7C00, np.uint16, 0xFC00),
}  # fmt: skip
"""By dtype: the bits of infinity as a signed number, and those of minus infinity as an unsigned
one. Larger bits are infinities and NaN (IEEE 754: the exponent is all ones), so that two maxima
find them without a temporary array."""


class Digest:
    """XXH3 (64 bits) of a tensor's bytes, chunk by chunk, and whether all its values are finite.

    Args:
        dtype: torch's name; of another name, such as an empty one, values are not checked.
    """

    def __init__(self, dtype: str) -> None:
        self._hash = xxhash.xxh3_64()
        self._limits = _BEYOND_FINITE.get(dtype)
        self.finite = True

    def add(self, chunk: np.ndarray) -> None:
        """Add a chunk of whole elements, as flat uint8."""
        self._hash.update(chunk)  # type: ignore[arg-type]  # an array is a buffer; numpy's stubs do not say so
        if self._limits is not None and len(chunk):
            signed, infinity, unsigned, minus_infinity = self._limits
            self.finite &= bool(chunk.view(signed).max() < infinity and chunk.view(unsigned).max() < minus_infinity)

    @property
    def value(self) -> int:
        value: int = self._hash.intdigest()
        return value


def digest_of(data: np.ndarray, dtype: str) -> Digest:
    """Return the digest of a whole tensor, given as a flat uint8 array."""
    digest = Digest(dtype)
    for begin in range(0, len(data), CHUNK):
        digest.add(data[begin : begin + CHUNK])
    return digest


def checksum(digests: Mapping[str, int]) -> str:
    """Combine the digests of named tensors into one checksum, whatever their order."""
    whole = xxhash.xxh3_64()
    for name in sorted(digests):
        whole.update(f"{name}\0{digests[name]:016x}\n".encode())
    return f"{ALGORITHM}:{whole.hexdigest()}"


def buckets(sizes: Sequence[int], bucket_bytes: int) -> list[range]:
    """Divide tensors in order into buckets of at most `bucket_bytes`; larger ones get their own.

    Returns:
        ranges of indices.
    """
    found, begin, filled = [], 0, 0
    for index, size in enumerate(sizes):
        if filled and filled + size > bucket_bytes:
            found.append(range(begin, index))
            begin, filled = index, 0
        filled += size
    return [*found, range(begin, len(sizes))] if sizes else []
