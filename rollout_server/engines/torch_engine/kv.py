"""The KV cache: rows in pools of doubling capacity, within one budget of tokens.

Why rows and not small blocks: on a CPU a decode step is bound by reading keys and values, and a batched matrix product
over one strided view reads each of them once; gathering blocks first would read and write them all again. A pool holds
rows of one capacity (128, 256, 512, ... tokens), so a batch with a long tail pays for each row what it holds, within a
factor of two. A sequence that outgrows its row is copied to the next pool.

Within a pool, rows `[0, active)` are the batch. Rows behind them hold the prefixes of finished requests, or nothing:

    row      0   1   2   3 | 4   5   6   7
             A   B   -   C | p   q   -   -        A, B, C run; p, q are kept prefixes; row 2 is a hole

A hole costs one row of wasted arithmetic until a new request fills it or `compact` closes it.

Layout, for a head's keys: `[dim, capacity]` (a query's scores are then sums of contiguous rows), and for its values:
`[capacity, dim]`. Sizes below: N layers, R rows, H key-value heads, K key dim, D value dim, C capacity.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rollout_server.engines.torch_engine.prefix import PrefixIndex

SMALLEST_CAPACITY = 96
MAX_HOLE_SHARE = 0.125
"""Share of a pool's active rows that may be holes before rows are moved to close them."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token costs in the cache."""

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
    """One sequence's keys and values: tokens `ids[:filled]` are in the cache.

    `in_use` while a request runs on it. `stale` once a weight update made its content unfit for other requests.
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
    """Rows of one capacity. `rows[i]` is what row i holds, or None."""

    def __init__(self, shape: KVShape, capacity: int) -> None:
        self.shape = shape
        self.capacity = capacity
        self.rows: list[Row | None] = []
        self.active = 0
        self._allocate(0)

    def _allocate(self, rows: int) -> None:
        s = self.shape
        # Zeros, not empty: masked scores weigh unused values by 0, and 0 times a NaN left in memory is a NaN.
        self.k_NRHKC = torch.zeros(
            s.layers, rows, s.kv_heads, s.key_dim, self.capacity, dtype=s.dtype, device=s.device
        )
        self.v_NRHCD = torch.zeros(
            s.layers, rows, s.kv_heads, self.capacity, s.value_dim, dtype=s.dtype, device=s.device
        )
        self.k = list(self.k_NRHKC)
        self.v = list(self.v_NRHCD)

    @property
    def tokens(self) -> int:
        """Cache tokens that this pool takes from the budget."""
        return len(self.rows) * self.capacity

    def resize(self, rows: int) -> None:
        """Change the number of rows; all rows in use or kept have to be among the first `rows`."""
        old_k, old_v, keep = self.k_NRHKC, self.v_NRHCD, min(rows, len(self.rows))
        assert not any(self.rows[keep:])
        self._allocate(rows)
        self.k_NRHKC[:, :keep] = old_k[:, :keep]
        self.v_NRHCD[:, :keep] = old_v[:, :keep]
        self.rows = self.rows[:keep] + [None] * (rows - keep)

    def shrink_to_fit(self) -> None:
        """Give back the rows that hold nothing."""
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
        """Move a row's content to an empty row."""
        row = self.rows[source]
        assert row is not None and self.rows[target] is None
        n = max(1, row.filled)
        self.k_NRHKC[:, target, :, :, :n] = self.k_NRHKC[:, source, :, :, :n]
        self.v_NRHCD[:, target, :, :n] = self.v_NRHCD[:, source, :, :n]
        self.rows[target], self.rows[source] = row, None
        row.row = target

    def swap(self, a: int, b: int) -> None:
        """Exchange the contents of two rows, either of which may be empty."""
        row_a, row_b = self.rows[a], self.rows[b]
        if row_b is None:
            self.move(a, b)
        elif row_a is None:
            self.move(b, a)
        else:
            n = max(1, row_a.filled, row_b.filled)
            pair, reverse = [a, b], [b, a]
            self.k_NRHKC[:, pair, :, :, :n] = self.k_NRHKC[:, reverse, :, :, :n]
            self.v_NRHCD[:, pair, :, :n] = self.v_NRHCD[:, reverse, :, :n]
            self.rows[a], self.rows[b] = row_b, row_a
            row_a.row, row_b.row = b, a

    def take(self, row: int) -> int:
        """Make row `row` one of the active ones; returns where it is now."""
        if row >= self.active:
            if row != self.active:
                self.swap(row, self.active)
                row = self.active
            self.active += 1
        return row

    def empty_row(self) -> int | None:
        """An empty row, a hole among the active ones if there is one."""
        return next((i for i, row in enumerate(self.rows) if row is None), None)

    def compact(self) -> bool:
        """Drop holes at the end of the active rows, and close the others if they are many. True if a row moved."""
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


class KVCache:
    """All pools, the budget, and the index of what can be shared.

    Args:
        shape: what a token costs.
        budget_tokens: capacity of all pools together, at most. One row for `context_length` tokens has to fit.
        context_length: tokens of the longest sequence.
    """

    def __init__(self, shape: KVShape, budget_tokens: int, context_length: int) -> None:
        capacities = [SMALLEST_CAPACITY, SMALLEST_CAPACITY * 4 // 3]
        while capacities[-1] < context_length:
            capacities.append(2 * capacities[-2])
        # The last pool need not hold more than the longest sequence, rounded to whole cache lines.
        capacities[-1] = min(capacities[-1], -(-context_length // 16) * 16)
        self.pools = [Pool(shape, capacity) for capacity in capacities]
        self.budget_tokens = max(budget_tokens, capacities[-1])
        self._index: PrefixIndex[Row] = PrefixIndex()
        self._clock = itertools.count(1)

    @property
    def tokens(self) -> int:
        """Tokens of the budget that are taken."""
        return sum(pool.tokens for pool in self.pools)

    @property
    def used_tokens(self) -> int:
        """Tokens that rows in use or kept really hold."""
        return sum(row.filled for pool in self.pools for row in pool.rows if row)

    def lookup(self, ids: Sequence[int]) -> tuple[Row | None, int]:
        """The row that shares the longest prefix with `ids`, and its length. The last id is never shared: it has to
        be run through the model to sample what follows it."""
        return self._index.find(ids, len(ids) - 1)

    def place(self, ids: list[int], room: int, match: Row | None, shared: int) -> Row | None:
        """A row for `ids` that holds the first `shared` of them already, taken over or copied from `match`.

        Args:
            ids: the sequence; the row keeps the list itself and sees it grow.
            room: tokens the row shall have space for at least.
            match: a row from `lookup`; its first `shared` tokens are in the cache.

        Returns:
            The row, or None when rows in use take the whole budget.
        """
        if match is not None and shared and not match.in_use and match.filled == shared:
            match.in_use = True
            match.pool.take(match.row)
            match.ids = ids
            if match.pool.capacity < room and not self.grow(match, room):
                self.release(match)
                return None
            return match
        pinned = match is not None and not match.in_use
        if match is not None and pinned:
            match.in_use = True  # so that making room does not evict what is about to be copied
        row = self._new_row(ids, room)
        if match is not None:
            match.in_use = match.in_use and not pinned
            match.used_at = next(self._clock)
            if row is not None and shared:
                self._copy(match, row, shared)
        return row

    def grow(self, row: Row, room: int) -> bool:
        """Move `row` to a pool with space for `room` tokens; False when rows in use take the whole budget."""
        new = self._new_row(row.ids, room)
        if new is None:
            return False
        # `row` keeps its identity: the request that runs on it holds it.
        pool, index = new.pool, new.row
        self._copy(row, new, row.filled)
        row.pool.rows[row.row] = None
        row.pool, row.row = pool, index
        pool.rows[index] = row
        return True

    def announce(self, row: Row, count: int) -> None:
        """Let `lookup` find the first `count` tokens of `row`, also those that are still to be filled."""
        self._index.add(row, count)

    def release(self, row: Row, *, keep: bool = True) -> None:
        """The request on `row` is done with it; what it holds stays shareable until its place is needed."""
        row.in_use = False
        row.used_at = next(self._clock)
        # A row in a hole is still written at position `filled` by the batch it sits in.
        row.filled = min(row.filled, row.pool.capacity - 1)
        if keep and not row.stale and row.filled:
            self._index.add(row, row.filled)
        else:
            self._drop(row)

    def flush(self) -> None:
        """Forget what finished requests left; what running ones hold will not be shared or kept."""
        self._index.clear()
        for row in list(self._all_rows()):
            if row.in_use:
                row.stale = True
            else:
                self._drop(row)

    def evict_all(self) -> None:
        """Give up all that finished requests left, memory included."""
        for row in list(self._all_rows()):
            if not row.in_use:
                self._drop(row)
        for pool in self.pools:
            pool.shrink_to_fit()

    def reset(self) -> None:
        """Empty everything, memory included. No request may be running."""
        self._index.clear()
        for pool in self.pools:
            pool.rows = []
            pool.active = 0
            pool.resize(0)

    def compact(self) -> bool:
        """Close holes; True if a row moved."""
        moved = [pool.compact() for pool in self.pools]
        return any(moved)

    def _all_rows(self) -> Iterator[Row]:
        return (row for pool in self.pools for row in pool.rows if row is not None)

    def _drop(self, row: Row) -> None:
        self._index.remove(row)
        row.pool.rows[row.row] = None
        row.filled = 0

    def _copy(self, source: Row, target: Row, count: int) -> None:
        s, t = source.row, target.row
        target.pool.k_NRHKC[:, t, :, :, :count] = source.pool.k_NRHKC[:, s, :, :, :count]
        target.pool.v_NRHCD[:, t, :, :count] = source.pool.v_NRHCD[:, s, :, :count]
        target.filled = count

    def _new_row(self, ids: list[int], room: int) -> Row | None:
        pool = next((pool for pool in self.pools if pool.capacity >= room), self.pools[-1])
        place = pool.empty_row()
        if place is None and self._extend(pool):
            place = pool.empty_row()
        if place is None:
            oldest = min(
                (row for row in pool.rows if row is not None and not row.in_use), key=lambda r: r.used_at, default=None
            )
            if oldest is None:
                return None
            place = oldest.row
            self._drop(oldest)
        place = pool.take(place)
        row = Row(pool, place, ids)
        pool.rows[place] = row
        return row

    def _extend(self, pool: Pool) -> bool:
        """Add rows to `pool`: twice as many if the budget allows, else as many as it does."""
        free = self.budget_tokens - self.tokens
        if free < pool.capacity:
            free += self._take_from_others(pool)
        count = min(max(4, len(pool.rows)), free // pool.capacity)
        if count > 0:
            pool.resize(len(pool.rows) + count)
        return count > 0

    def _take_from_others(self, pool: Pool) -> int:
        """Evict kept rows of other pools, oldest first, until one row of `pool` fits; returns the tokens given back."""
        before = self.tokens
        missing = pool.capacity - (self.budget_tokens - before)
        others = [other for other in self.pools if other is not pool]
        if any(row is not None and not row.in_use for row in pool.rows):
            return 0  # evicting one of its own is cheaper than moving memory between pools
        gain = sum(other.capacity * other.rows.count(None) for other in others)
        kept = [row for other in others for row in other.rows if row is not None and not row.in_use]
        for row in sorted(kept, key=lambda r: r.used_at):
            if gain >= missing:
                break
            gain += row.pool.capacity
            self._drop(row)
        if gain < missing:
            return 0
        for other in others:
            if None in other.rows:
                other.shrink_to_fit()
        return before - self.tokens
