"""Write numpy's files so that a full disk is an error that says so.

`np.save` reports a short write without the error of the system, and a mapped file on a disk that
fills up ends the process with a signal.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

BLOCK_ROWS = 2**20

Array = npt.NDArray[Any]


def write_header(file: BinaryIO, kind: npt.DTypeLike, shape: tuple[int, ...]) -> None:
    """Write what stands before the numbers of a `.npy` file."""
    descr = np.lib.format.dtype_to_descr(np.dtype(kind))
    np.lib.format.write_array_header_2_0(file, {"descr": descr, "fortran_order": False, "shape": shape})


def write_rows(file: BinaryIO, array: Array) -> None:
    """Append the numbers of an array, in blocks."""
    for begin in range(0, len(array), BLOCK_ROWS):
        file.write(np.ascontiguousarray(array[begin : begin + BLOCK_ROWS]).tobytes())


def save_array(file: BinaryIO, array: Array) -> None:
    """Write an array as `np.save` does.

    Raises:
        OSError: with the number of the system's error.
    """
    write_header(file, array.dtype, array.shape)
    write_rows(file, array)


def new_array(path: Path, kind: npt.DTypeLike, length: int) -> Array:
    """Return an array that is written to a file as it is filled, outside of this process's memory.

    The space is taken at once.
    """
    with path.open("wb") as file:
        write_header(file, kind, (length,))
        begin = file.tell()
        size = length * np.dtype(kind).itemsize
        if size:
            file.flush()
            os.posix_fallocate(file.fileno(), begin, size)
    if not length:  # nothing can be mapped
        return np.zeros(0, kind)
    return np.memmap(path, kind, "r+", begin, (length,))
