"""Rows of the KV cache, in pools of one capacity each.

Rows instead of small blocks: on a CPU, a decode step is bound by reading keys and values, and a
batched matmul over one strided view reads each of them once; gathering blocks first would read and
write all of them again. A pool has rows of one capacity (96, 128, 192, 256, 384, ... tokens), so
that each row of a batch with a long tail costs at most a third more than its tokens. A sequence
always lies in the first pool that has room for it and its next token. The number of columns that
attention computes for a token then follows from its position, and so do the bits of the result (a
matmul over more columns may add them up in another order). A sequence that outgrows its row is
copied to the next pool.

Within a pool, rows `[0, active)` are the batch. Rows behind them hold prefixes of finished
requests, or nothing:

    row      0   1   2   3 | 4   5   6   7
             A   B   -   C | p   q   -   -        A, B, C run; p, q are kept; row 2 is a hole

A hole costs one row of wasted arithmetic until a new request fills it or `compact` closes it.

Layout of a head's keys: `[dim, capacity]`, so that a query's scores are sums of contiguous rows; of
its values: `[capacity, dim]`. Sizes below: N layers, R rows, H key-value heads, K key dim, D value
dim, C capacity.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rollout_server.engines.torch_engine.cache.memory import GrowingRows

MAX_HOLE_SHARE = 0.125
"""Share of a pool's active rows that may be holes before rows are moved to close them."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """Size and type of what one token takes in the cache."""

    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return self.layers * self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class Row:
    """The keys and values of one sequence.

    Attributes:
        pool, row: its place.
        ids: the sequence; the first `filled` tokens are in the cache.
        in_use: whether a request runs on it.
        stale: whether old weights computed it; other requests must not share it.
        used_at: when it was last released or shared, on the cache's clock.
        keys: its keys in the prefix index.
    """

    __slots__ = ("filled", "ids", "in_use", "keys", "pool", "row", "stale", "used_at")

    def __init__(self, pool: Pool, row: int, ids: list[int]) -> None:
        self.pool = pool
        self.row = row
        self.ids = ids
        self.filled = 0
        self.in_use = True
        self.stale = False
        self.used_at = 0
        self.keys: list[int] = []


class Pool:
    """Rows of one capacity.

    Args:
        capacities: of all pools, ascending.

    Attributes:
        rows: the content of each row; None if it is empty.
        kept: rows that are not in use, least recently used first.
        active: number of rows in the batch, from the first one on.
    """

    def __init__(self, shape: KVShape, capacity: int, most_rows: int, capacities: Sequence[int]) -> None:
        self.shape = shape
        self.capacity = capacity
        self._capacities = capacities
        self.rows: list[Row | None] = []
        self.kept: OrderedDict[Row, None] = OrderedDict()
        self.active = 0
        # Where searches begin: no row before is empty, no active row before is a hole. With
        # thousands of kept rows, a search over all of them would cost as much as the tokens of a
        # request.
        self._empty_from = 0
        self._hole_from = 0

        s = shape
        heads, layers = s.kv_heads, s.layers
        self._k = GrowingRows(layers, (heads, s.key_dim, capacity), most_rows, dtype=s.dtype, device=s.device)
        self._v = GrowingRows(layers, (heads, capacity, s.value_dim), most_rows, dtype=s.dtype, device=s.device)
        self._set_views()

    def _set_views(self) -> None:
        self.k_NRHKC, self.v_NRHCD = self._k.tensor, self._v.tensor
        self.k = list(self.k_NRHKC)
        self.v = list(self.v_NRHCD)
        self.k_flat = [k.view(-1) for k in self.k]
        self.v_flat = [v.view(-1, self.shape.value_dim) for v in self.v]

    def capacity_for(self, tokens: int) -> int:
        """Return the capacity of the pool for a sequence of `tokens` tokens."""
        return self._capacities[bisect_left(self._capacities, tokens)]

    @property
    def tokens(self) -> int:
        """Tokens of the budget that this pool takes."""
        return len(self.rows) * self.capacity

    def resize(self, rows: int) -> None:
        """Change the number of rows; those in use or kept must be among the first `rows`."""
        keep = min(rows, len(self.rows))
        assert not any(self.rows[keep:])
        self._k.resize(rows, keep)
        self._v.resize(rows, keep)
        self._set_views()
        self.rows = self.rows[:keep] + [None] * (rows - keep)
        self._empty_from = min(self._empty_from, keep)

    def keep(self, row: Row) -> None:
        """Mark a row as no longer in use. Its content stays until its space is needed."""
        row.in_use = False
        self.kept[row] = None
        self._hole_from = min(self._hole_from, row.row)

    def clear(self, row: int) -> None:
        """Make row `row` empty."""
        if (held := self.rows[row]) is not None:
            self.kept.pop(held, None)
        self.rows[row] = None
        self._empty_from = min(self._empty_from, row)
        self._hole_from = min(self._hole_from, row)

    def clear_all(self) -> None:
        """Drop all rows and give back their memory."""
        self.rows = []
        self.kept.clear()
        self.active = 0
        self.resize(0)

    def shrink_to_fit(self) -> None:
        """Give back empty rows, after moving the last rows into them."""
        for hole in [i for i, row in enumerate(self.rows) if row is None]:
            while self.rows and self.rows[-1] is None:
                self.rows.pop()
            if hole >= len(self.rows):
                break
            self.move(len(self.rows) - 1, hole)

        while self.rows and self.rows[-1] is None:
            self.rows.pop()
        self.active = min(self.active, len(self.rows))
        self.resize(len(self.rows))

    def move(self, source: int, target: int) -> None:
        """Move the content of row `source` to the empty row `target`."""
        row = self.rows[source]
        assert row is not None and self.rows[target] is None
        n = max(1, row.filled)
        self.k_NRHKC[:, target, :, :, :n] = self.k_NRHKC[:, source, :, :, :n]
        self.v_NRHCD[:, target, :, :n] = self.v_NRHCD[:, source, :, :n]
        self.rows[target], self.rows[source] = row, None
        row.row = target
        self._empty_from = min(self._empty_from, source)
        self._hole_from = min(self._hole_from, target, source)

    def swap(self, a: int, b: int) -> None:
        """Exchange the contents of two rows, either of which may be empty."""
        row_a, row_b = self.rows[a], self.rows[b]
        if row_b is None:
            self.move(a, b)
        elif row_a is None:
            self.move(b, a)
        else:
            n = max(1, row_a.filled, row_b.filled)
            k_a, k_b = self.k_NRHKC[:, a, :, :, :n], self.k_NRHKC[:, b, :, :, :n]
            v_a, v_b = self.v_NRHCD[:, a, :, :n], self.v_NRHCD[:, b, :, :n]

            k_kept, v_kept = k_a.clone(), v_a.clone()
            k_a.copy_(k_b)
            v_a.copy_(v_b)
            k_b.copy_(k_kept)
            v_b.copy_(v_kept)

            self.rows[a], self.rows[b] = row_b, row_a
            row_a.row, row_b.row = b, a
            self._hole_from = min(self._hole_from, a, b)

    def take(self, row: int) -> int:
        """Activate the empty or kept row `row`, in a hole if there is one; return its number."""
        if row < self.active:
            return row

        rows = self.rows
        active = range(min(self._hole_from, self.active), self.active)
        place = next((i for i in active if (held := rows[i]) is None or not held.in_use), self.active)
        self._hole_from = place
        if place == self.active:
            self.active += 1
        if place != row:
            self.swap(row, place)
        return place

    def empty_row(self) -> int | None:
        """Return the number of the first empty row; None if no row is empty."""
        found = next((i for i in range(self._empty_from, len(self.rows)) if self.rows[i] is None), None)
        self._empty_from = len(self.rows) if found is None else found
        return found

    def compact(self) -> bool:
        """Drop holes at the end of the active rows, and close the others if there are many.

        Returns whether rows moved.
        """
        rows = self.rows
        holes = [i for i in range(self.active) if (row := rows[i]) is None or not row.in_use]
        while holes and holes[-1] == self.active - 1:
            holes.pop()
            self.active -= 1
        if len(holes) <= self.active * MAX_HOLE_SHARE:
            return False

        for hole in holes:
            if hole >= self.active:
                break
            self.swap(self.active - 1, hole)
            self.active -= 1
            while self.active and ((last := rows[self.active - 1]) is None or not last.in_use):
                self.active -= 1

        return True
