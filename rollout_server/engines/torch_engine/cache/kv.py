"""The KV cache: pools of rows within one budget of tokens, and the index of prefixes that can be
shared.

`rows.py` explains how a pool is laid out, and why.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from rollout_server.engines.torch_engine.cache.prefix import PrefixIndex
from rollout_server.engines.torch_engine.cache.rows import KVShape, Pool, Row

SMALLEST_CAPACITY = 96
"""Tokens of a row in the first pool."""


class KVCache:
    """All pools, their budget, and the index of prefixes.

    Args:
        shape: cache size of one token.
        budget_tokens: largest capacity of all pools together; raised to one row of `context_length`
            tokens.
        context_length: tokens of the longest sequence.
    """

    def __init__(self, shape: KVShape, budget_tokens: int, context_length: int) -> None:
        steps = [SMALLEST_CAPACITY, SMALLEST_CAPACITY * 4 // 3]
        while steps[-1] < context_length:
            steps.append(2 * steps[-2])
        # Rows of the last pool hold the longest sequence, rounded up to whole cache lines.
        capacities = [step for step in steps if step < context_length] + [-(-context_length // 16) * 16]
        self.budget_tokens = max(budget_tokens, capacities[-1])
        self.pools = [
            Pool(shape, capacity, self.budget_tokens // capacity, capacities) for capacity in capacities
        ]  # fmt: skip

        self._index: PrefixIndex[Row] = PrefixIndex()
        self._clock = itertools.count(1)

    @property
    def tokens(self) -> int:
        """Tokens of the budget in use."""
        return sum(pool.tokens for pool in self.pools)

    def lookup(self, ids: Sequence[int]) -> tuple[Row | None, int]:
        """Return the row that shares the longest prefix with `ids`, and the prefix's length.

        The last id is never shared: the model must run on it to sample the next token.
        """
        return self._index.find(ids, len(ids) - 1)

    def place(self, ids: list[int], room: int, match: Row | None, shared: int) -> Row | None:
        """Return a row for `ids`, which takes over `match` or copies its first `shared` tokens.

        Args:
            ids: the sequence. The row refers to this list, and sees it grow.
            room: tokens that the row needs space for; it lies in the first pool that has it.
            match: a row from `lookup`, whose first `shared` tokens are in the cache.

        Returns:
            The row; None if rows in use take the whole budget.
        """
        # A finished request's row, shared to its end, is taken over without a copy.
        whole = match is not None and not match.in_use and match.filled == shared > 0
        # A row whose prompt was never completely prefilled may lie in a larger pool than this
        # sequence belongs to.
        if match is not None and whole and match.pool.capacity <= self._pool_for(room).capacity:
            del match.pool.kept[match]
            match.pool.take(match.row)
            match.in_use = True
            match.ids = ids
            if match.pool.capacity < room and not self.grow(match, room):
                self.release(match)
                return None
            return match

        pinned = match is not None and not match.in_use
        if match is not None and pinned:
            del match.pool.kept[match]
            match.in_use = True  # making room must not evict it before it is copied
        row = self._new_row(ids, room)
        if match is not None:
            match.used_at = next(self._clock)
            if pinned:
                match.pool.keep(match)
            if row is not None and shared:
                self._copy(match, row, shared)
        return row

    def grow(self, row: Row, room: int) -> bool:
        """Move `row` to the pool that has `room`; False if rows in use take the whole budget."""
        new = self._new_row(row.ids, room)
        if new is None:
            return False

        # `row` stays the same object, because the request that runs on it refers to it.
        pool, index = new.pool, new.row
        self._copy(row, new, row.filled)
        row.pool.clear(row.row)
        row.pool, row.row = pool, index
        pool.rows[index] = row
        return True

    def announce(self, row: Row, count: int) -> None:
        """Let `lookup` find the first `count` tokens of `row`, those still to be prefilled too."""
        self._index.add(row, count)

    def release(self, row: Row, *, keep: bool = True) -> None:
        """Free `row`. With `keep` its tokens stay shareable until its space is needed."""
        row.pool.keep(row)
        row.used_at = next(self._clock)
        # The batch that the row is in may still write at position `filled`.
        row.filled = min(row.filled, row.pool.capacity - 1)
        if keep and not row.stale and row.filled:
            self._index.add(row, row.filled)
        else:
            self._drop(row)

    def forget(self) -> None:
        """Drop the rows of finished requests, and keep their memory for the next ones.

        Allocating it again would copy the pool each time it doubles.
        """
        for pool in self.pools:
            for row in list(pool.kept):
                self._drop(row)

    def flush(self) -> None:
        """Drop the rows of finished requests, and give back their memory."""
        self.forget()
        for pool in self.pools:
            pool.shrink_to_fit()

    def make_stale(self) -> None:
        """Do not share or keep the cache of running requests: old weights computed it."""
        self._index.clear()
        for row in self._all_rows():
            row.stale = True

    def reset(self) -> None:
        """Drop all rows and give back their memory. No request may be running."""
        self._index.clear()
        for pool in self.pools:
            pool.clear_all()

    def compact(self) -> bool:
        """Close holes in the pools; return whether a row moved."""
        moved = [pool.compact() for pool in self.pools]
        return any(moved)

    def _all_rows(self) -> Iterator[Row]:
        return (row for pool in self.pools for row in pool.rows if row is not None)

    def _drop(self, row: Row) -> None:
        self._index.remove(row)
        row.pool.clear(row.row)
        row.filled = 0

    def _copy(self, source: Row, target: Row, count: int) -> None:
        s, t = source.row, target.row
        target.pool.k_NRHKC[:, t, :, :, :count] = source.pool.k_NRHKC[:, s, :, :, :count]
        target.pool.v_NRHCD[:, t, :, :count] = source.pool.v_NRHCD[:, s, :, :count]
        target.filled = count

    def _pool_for(self, tokens: int) -> Pool:
        return next((pool for pool in self.pools if pool.capacity >= tokens), self.pools[-1])

    def _new_row(self, ids: list[int], room: int) -> Row | None:
        """Return an empty active row; None if rows in use take the whole budget."""
        # In this order: an empty row, more memory, the place of the row that was used least
        # recently.
        pool = self._pool_for(room)
        place = pool.empty_row()
        if place is None and self._extend(pool):
            place = pool.empty_row()
        if place is None:
            oldest = next(iter(pool.kept), None)
            if oldest is None:
                return None
            place = oldest.row
            self._drop(oldest)

        place = pool.take(place)
        row = Row(pool, place, ids)
        pool.rows[place] = row
        return row

    def _extend(self, pool: Pool) -> bool:
        """Double the rows of `pool` within the budget; return whether any rows were added."""
        free = self.budget_tokens - self.tokens
        if free < pool.capacity:
            free += self._take_from_others(pool)
        count = min(max(4, len(pool.rows)), free // pool.capacity)
        if count > 0:
            pool.resize(len(pool.rows) + count)
        return count > 0

    def _take_from_others(self, pool: Pool) -> int:
        """Take empty rows, then the oldest kept ones, from other pools; return the tokens freed.

        Take a quarter of the pool's size at once if possible, because every change of size may copy
        a whole pool.
        """
        if pool.kept:
            return 0  # evicting one of its own rows is cheaper than moving memory between pools

        before = self.tokens
        free = self.budget_tokens - before
        others = [other for other in self.pools if other is not pool]
        gain = sum(other.capacity * other.rows.count(None) for other in others)
        kept = [row for other in others for row in other.kept]
        if free + gain + sum(row.pool.capacity for row in kept) < pool.capacity:
            return 0

        for row in sorted(kept, key=lambda r: r.used_at):
            if free + gain >= max(pool.capacity, pool.tokens // 4):
                break
            gain += row.pool.capacity
            self._drop(row)

        for other in others:
            if None in other.rows:
                other.shrink_to_fit()
        return before - self.tokens


def build_cache(
    shape: KVShape, context_length: int, *, max_running: int, max_kv_tokens: int | None, memory_bytes: int
) -> KVCache:
    """Create a KV cache within a budget.

    Args:
        max_kv_tokens: the budget in tokens; None: room for `max_running` sequences of up to 1024
            tokens, within a quarter of the memory. Shorter sequences leave room for the prefixes of
            finished ones.
        memory_bytes: memory of the device.
    """
    if max_kv_tokens is None:
        usual = min(context_length, 1024)
        fits = memory_bytes // 4 // shape.bytes_per_token
        max_kv_tokens = max(context_length, min(max_running * usual, fits))
    return KVCache(shape, max_kv_tokens, context_length)
