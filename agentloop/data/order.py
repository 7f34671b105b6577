"""The order in which training sees the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.random import default_rng  # `np.random` would be imported when the first episode waits for it


class RowOrder:
    """Maps the i-th group of a run to its row; each epoch has its own order.

    A pure function of (rows, seed, i): a resumed run needs no saved position.
    """

    def __init__(self, rows: int, seed: int, *, shuffle: bool) -> None:
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._order: np.ndarray[Any, Any] = np.arange(rows)

    def __getitem__(self, index: int) -> int:
        epoch, position = divmod(index, self._rows)
        if self._shuffle and epoch != self._epoch:
            self._order = default_rng((self._seed, epoch)).permutation(self._rows)
            self._epoch = epoch
        return int(self._order[position])
