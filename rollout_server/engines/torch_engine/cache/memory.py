"""Memory of the KV cache that can grow without being copied.

On Linux, address space for the largest size of a pool is reserved at the start. Its pages are zeros
that take no memory until they are written, and they are given back when the pool shrinks. On other
systems, and on devices other than the CPU, a tensor has the present size and growing copies it:
with half a gigabyte, running requests wait for most of a second.

Sizes: N layers, R rows.
"""

from __future__ import annotations

import math
import mmap
import sys

import torch

_NO_RESERVE = 0x4000
"""MAP_NORESERVE: do not count the reservation against the memory that the kernel may commit. Most
is never used."""


class GrowingRows:
    """A tensor [N, R, ...] whose number of rows changes. A new row holds zeros, or old values.

    Args:
        layers: N.
        row: the shape of one row.
        most: largest R.
        reserve: False: copy, even where address space can be reserved.

    Attributes:
        tensor: [N, at least R, ...]; `resize` replaces it where memory cannot be reserved.
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
        """Change R to `rows`. The first `keep` rows keep their content; memory behind the last row
        is given back."""
        before, self._rows = self._rows, rows
        if self._map is None:
            old, self.tensor = self.tensor, self._zeros(rows)
            self.tensor[:, :keep] = old[:, :keep]
        elif rows < before:
            self._give_back(rows)

    def _zeros(self, rows: int) -> torch.Tensor:
        layers, row = self._shape
        # Zeros, not `empty`: masked scores multiply unused values by 0, and 0 times a NaN left in
        # memory is NaN.
        # The dict loses the options' types.
        return torch.zeros(layers, rows, *row, **self._options)  # type: ignore[call-overload,no-any-return]

    def _give_back(self, first: int) -> None:
        """Give back the pages of all rows from `first` on; with `first` 0, all written pages."""
        assert self._map is not None
        if first == 0:
            self._map.madvise(mmap.MADV_DONTNEED)
            return

        for layer in range(self._shape[0]):
            begin = (layer * self._most + first) * self._row_bytes
            end = (layer + 1) * self._most * self._row_bytes
            # Whole pages only: the first and the last one may belong to neighbours as well.
            begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
            end = end // mmap.PAGESIZE * mmap.PAGESIZE
            if begin < end:
                self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _reserve(size: int) -> mmap.mmap | None:
    """Reserve private pages of zeros without memory behind them; None if that fails."""
    if sys.platform != "linux" or not size:
        return None
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except OSError:
        return None
