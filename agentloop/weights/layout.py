"""Published tensors as bytes: where they lie in a file, and a checksum of what they hold. No torch.

The file is safetensors: eight bytes that say how long the header is, the header (JSON), the tensors without gaps. Here
the header is padded so that the tensors begin at a multiple of 64 bytes, and wider elements come first, so that every
tensor can be used where it lies.
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
"""Bytes that are copied, hashed and looked at in one go: they stay in a core's cache between the three."""

ALGORITHM = "xxh3"
"""How a checksum begins: those of engines with a function of their own begin otherwise."""

MAX_HEADER = 100 * 2**20
_ALIGNMENT = 64

CODES = {
    "float64": ("F64", 8), "int64": ("I64", 8), "uint64": ("U64", 8), "float32": ("F32", 4), "int32": ("I32", 4),
    "uint32": ("U32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "int16": ("I16", 2), "uint16": ("U16", 2),
    "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1),
}  # fmt: skip
"""Torch's name of a dtype: safetensors' name, and the bytes of an element."""

_NAMES = {code: name for name, (code, _) in CODES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a file: bytes `[begin, end)` of it, counted from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class LayoutError(ValueError):
    """A file is no safetensors file, or not a whole one."""


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor; `dtype` is torch's name.

    Raises:
        LayoutError: the dtype is not one that is published, or a dimension is negative.
    """
    if dtype not in CODES or any(size < 0 for size in shape):
        raise LayoutError(f"dtype {dtype} with shape {list(shape)} is not known")
    return CODES[dtype][1] * math.prod(shape)


def plan_file(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> tuple[bytes, list[TensorSpec]]:
    """The first bytes of a file for (name, dtype, shape) triples, and where each tensor goes, in the file's order."""
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
    """The tensors of a safetensors file in their order, every offset checked against the file's length.

    Raises:
        LayoutError: it is no such file, it is shorter than its header says, or tensors overlap.
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
        header.pop("__metadata__", None)
        specs = [_spec(name, entry, 8 + length) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise LayoutError(f"{path} cannot be read: its header is damaged: {exc!r}") from exc
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
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(length) for length in entry["shape"])
    spec = TensorSpec(name, _NAMES[entry["dtype"]], shape, start + begin, start + end)
    if end - begin != tensor_bytes(spec.dtype, shape):
        raise ValueError(f"the place of {name!r} does not fit its shape {list(shape)}")
    return spec


_BEYOND_FINITE = {
    "float64": (np.int64, 0x7FF0 << 48, np.uint64, 0xFFF0 << 48),
    "float32": (np.int32, 0x7F80_0000, np.uint32, 0xFF80_0000),
    "bfloat16": (np.int16, 0x7F80, np.uint16, 0xFF80), "float16": (np.int16, 0x7C00, np.uint16, 0xFC00),
}  # fmt: skip
"""By dtype: the bits of infinity as a signed number, and those of minus infinity as an unsigned one. Bits from there on
are infinities and NaN (IEEE 754: the exponent is all ones), so that two maxima find them without a temporary."""


class Digest:
    """XXH3 (64 bits) of the bytes of one tensor, chunk by chunk, and whether all its values are finite."""

    def __init__(self, dtype: str) -> None:
        self._hash = xxhash.xxh3_64()
        self._limits = _BEYOND_FINITE.get(dtype)
        self.finite = True

    def add(self, chunk: np.ndarray) -> None:
        """Flat uint8, whole elements."""
        self._hash.update(chunk)  # type: ignore[arg-type]
        if self._limits is not None and len(chunk):
            signed, infinity, unsigned, minus_infinity = self._limits
            self.finite &= bool(chunk.view(signed).max() < infinity and chunk.view(unsigned).max() < minus_infinity)

    @property
    def value(self) -> int:
        value: int = self._hash.intdigest()
        return value


def digest_of(data: np.ndarray, dtype: str) -> Digest:
    """The digest of a whole tensor, given as a flat uint8 array."""
    digest = Digest(dtype)
    for begin in range(0, len(data), CHUNK):
        digest.add(data[begin : begin + CHUNK])
    return digest


def checksum(digests: Mapping[str, int]) -> str:
    """One checksum of a set of tensors from each one's digest: the order does not matter, the names do."""
    whole = xxhash.xxh3_64()
    for name in sorted(digests):
        whole.update(f"{name}\0{digests[name]:016x}\n".encode())
    return f"{ALGORITHM}:{whole.hexdigest()}"


def buckets(sizes: Sequence[int], bucket_bytes: int) -> list[range]:
    """Which tensors travel together, as ranges of indices: in their order, no bucket larger than `bucket_bytes` but for
    a single tensor that is."""
    found, begin, filled = [], 0, 0
    for index, size in enumerate(sizes):
        if filled and filled + size > bucket_bytes:
            found.append(range(begin, index))
            begin, filled = index, 0
        filled += size
    return [*found, range(begin, len(sizes))] if sizes else []
