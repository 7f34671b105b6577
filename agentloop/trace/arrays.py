"""Columns of arrow from values and from numpy, and back.

`pa.array` and `to_numpy` do the same, but import pandas. That takes longer than to write a step of
a run, in a thread beside its event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

_MOST = np.iinfo(np.int32).max


def numbers(values: np.ndarray, null: np.ndarray | None = None) -> pa.Array:
    """Return numbers as an array; `null` marks entries without a number."""
    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [_valid(null), data])


def flags(values: np.ndarray) -> pa.Array:
    """Return booleans as an array."""
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, _bits(values)])


def column(values: Sequence[Any], kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """Return values, None for null: texts, numbers, or for a map lists of (text, number)."""
    if kind == pa.string():
        return texts(values)
    null = _nulls(values)
    if pa.types.is_map(kind):
        pairs = [pair for value in values for pair in value or ()]
        items = column([number for _, number in pairs], kind.item_type)
        mask = None if null is None else flags(null)
        names = texts([name for name, _ in pairs])
        return pa.MapArray.from_arrays(numbers(_offsets(values)), names, items, type=kind, mask=mask)
    known = (0 if value is None else value for value in values)
    return numbers(np.fromiter(known, kind.to_pandas_dtype(), len(values)), null)


def texts(values: Sequence[str | None]) -> pa.Array | pa.ChunkedArray:
    """Return texts as an array; in chunks, if they have more than 2 GiB together."""
    parts = [None if text is None else text.encode() for text in values]
    if sum(len(part or b"") for part in parts) > _MOST:
        return pa.array(values, pa.string())
    buffers = [_valid(_nulls(parts)), pa.py_buffer(_offsets(parts)), pa.py_buffer(b"".join(filter(None, parts)))]
    return pa.Array.from_buffers(pa.string(), len(parts), buffers)


def text_lists(values: Sequence[Sequence[str]], kind: pa.DataType) -> pa.Array:
    """Return lists of texts as an array of type `kind`."""
    return pa.ListArray.from_arrays(
        numbers(_offsets(values)), texts([text for one in values for text in one]), type=kind
    )


def null_flags(array: pa.Array) -> np.ndarray:
    """Return which entries are null, shape [entries]."""
    if not array.null_count:
        return np.zeros(len(array), dtype=bool)
    valid = array.buffers()[0]
    if valid is None:  # of a type without bits for that, in a file that another program wrote
        return np.asarray(array.is_null().to_numpy(zero_copy_only=False))
    return ~_unpacked(valid, array)


def to_numpy(array: pa.Array) -> np.ndarray:
    """Return numbers or booleans, shape [entries]; with nulls in it float64, and NaN for them."""
    if pa.types.is_boolean(array.type):
        values = _unpacked(array.buffers()[1], array)
    elif pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        dtype, data = np.dtype(array.type.to_pandas_dtype()), array.buffers()[1]
        # An array without entries need not have a buffer.
        values = np.frombuffer(data, dtype, len(array), array.offset * dtype.itemsize) if data else np.zeros(0, dtype)
    else:  # of a file that another program wrote
        return np.asarray(array.to_numpy(zero_copy_only=False))
    if not array.null_count:
        return values
    return np.where(null_flags(array), np.nan, values)


def _nulls(values: Sequence[Any]) -> np.ndarray | None:
    null = np.fromiter((value is None for value in values), bool, len(values))
    return null if null.any() else None


def _offsets(parts: Sequence[Any]) -> np.ndarray:
    """Return where each part begins among all of them, and where the last ends."""
    offsets = np.zeros(len(parts) + 1, dtype=np.int32)
    np.cumsum(np.fromiter((len(part or ()) for part in parts), np.int32, len(parts)), out=offsets[1:])
    return offsets


def _valid(null: np.ndarray | None) -> pa.Buffer | None:
    return None if null is None else _bits(~null)


def _bits(values: np.ndarray) -> pa.Buffer:
    return pa.py_buffer(np.packbits(values, bitorder="little"))


def _unpacked(bits: pa.Buffer | None, array: pa.Array) -> np.ndarray:
    """Return an array's part of a buffer of bits."""
    if bits is None:
        return np.zeros(0, dtype=bool)
    end = array.offset + len(array)
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=end, bitorder="little")[array.offset :].astype(bool)
