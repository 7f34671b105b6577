"""Memory of the KV cache that can grow without being copied.

On Linux, address space for all rows that a pool may ever have is reserved at once. Its pages are zeros that cost
nothing before they are written, and they are given back when the pool shrinks. Elsewhere, and on other devices than the
CPU, a tensor is as large as it has to be, and growing copies it: with half a gigabyte, running requests wait for that
most of a second.

Sizes: N layers, R rows.
"""

from __future__ import annotations

import math
import mmap
import sys

import torch

_NO_RESERVE = 0x4000
"""MAP_NORESERVE: most of the address space is never used, so it is not counted against what may be promised."""


class GrowingRows:
    """A tensor [N, R, ...] whose number of rows changes; new rows are zeros, or what an earlier one left there.

    Args:
        layers: N.
        row: the shape of one row.
        most: R at most.
        reserve: False: copy, even where address space could be reserved.

    Attributes:
        tensor: [N, R or more, ...]; made anew by `resize` where memory cannot be reserved.
    """

    def __init__(
        self,
        layers: int,
        row: tuple[int, ...],
        most: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        reserve: bool = True,
    ) -> None:
        self._shape = (layers, row)
        self._options = {"dtype": dtype, "device": device}
        self._rows = 0
        self._row_bytes = math.prod(row) * dtype.itemsize
        self._most = most
        reserve = reserve and device.type == "cpu"
        self._map = _reserve(layers * most * self._row_bytes) if reserve else None
        if self._map is None:
            self.tensor = self._zeros(0)
        else:
            self.tensor = torch.frombuffer(self._map, dtype=dtype).view(layers, most, *row)

    def resize(self, rows: int, keep: int) -> None:
        """Have `rows` rows, of which the first `keep` stay as they are; memory of the others is given back."""
        before, self._rows = self._rows, rows
        if self._map is None:
            old, self.tensor = self.tensor, self._zeros(rows)
            self.tensor[:, :keep] = old[:, :keep]
        elif rows < before:
            self._give_back(rows)

    def _zeros(self, rows: int) -> torch.Tensor:
        layers, row = self._shape
        # Zeros, not empty: masked scores weigh unused values by 0, and 0 times a NaN left in memory is a NaN.
        return torch.zeros(layers, rows, *row, **self._options)  # type: ignore[call-overload,no-any-return]

    def _give_back(self, first: int) -> None:
        """The pages of all rows from `first` on; with all rows, everything: nothing that was written survives."""
        assert self._map is not None
        if first == 0:
            self._map.madvise(mmap.MADV_DONTNEED)
            return
        for layer in range(self._shape[0]):
            begin = (layer * self._most + first) * self._row_bytes
            end = (layer + 1) * self._most * self._row_bytes
            begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
            end = end // mmap.PAGESIZE * mmap.PAGESIZE
            if begin < end:
                self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _reserve(size: int) -> mmap.mmap | None:
    """Private pages of zeros, none of them there yet; None where that cannot be had."""
    if sys.platform != "linux" or not size:
        return None
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except OSError:
        return None
