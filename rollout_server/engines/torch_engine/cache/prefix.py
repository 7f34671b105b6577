"""Find the row that shares the longest prefix with a new prompt.

Token lists are cut into blocks. The key of block i is a hash chained over blocks 0..i, so one
dictionary look-up shows whether any row starts with the same i+1 blocks. Candidates are compared id
by id: a hash collision only costs time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

BLOCK = 16
CANDIDATES = 4
"""Number of rows compared beyond the last shared block. All share it, so a few are enough."""


class Indexed(Protocol):
    """The part of a row that the index uses: its tokens, and the keys under which it is indexed."""

    ids: list[int]
    keys: list[int]


def block_keys(ids: Sequence[int], count: int) -> Iterator[int]:
    """Return the chained keys of the whole blocks in `ids[:count]`."""
    key = 0
    for start in range(0, count - count % BLOCK, BLOCK):
        key = hash((key, *ids[start : start + BLOCK]))
        yield key


def common_prefix(a: Sequence[int], b: Sequence[int], start: int, limit: int) -> int:
    """Return the length of the common prefix of `a` and `b`, from `start` (known) to `limit`."""
    limit = min(limit, len(a), len(b))
    while start < limit and a[start] == b[start]:
        start += 1
    return start


RowT = TypeVar("RowT", bound=Indexed)


class PrefixIndex(Generic[RowT]):
    """Rows by the blocks at the start of their tokens."""

    def __init__(self) -> None:
        self._rows: dict[int, list[RowT]] = {}

    def add(self, row: RowT, count: int) -> None:
        """Index the first `count` tokens of `row`, in addition to what is indexed already."""
        known = len(row.keys)
        for i, key in enumerate(block_keys(row.ids, count)):
            if i >= known:
                row.keys.append(key)
                self._rows.setdefault(key, []).append(row)

    def remove(self, row: RowT) -> None:
        """Remove all entries of `row`."""
        for key in row.keys:
            rows = self._rows[key]
            rows.remove(row)
            if not rows:
                del self._rows[key]
        row.keys.clear()

    def find(self, ids: Sequence[int], limit: int) -> tuple[RowT | None, int]:
        """Return the row with the longest shared prefix, and the prefix's length up to `limit`."""
        # Whole blocks first: follow the chain of keys as far as any row goes.
        deepest: list[RowT] = []
        shared = 0
        for key in block_keys(ids, limit):
            rows = self._rows.get(key)
            if rows is None:
                break
            deepest = rows
            shared += BLOCK

        # Then single tokens, for the rows added last.
        best: RowT | None = None
        length = 0
        for row in deepest[-CANDIDATES:]:
            if row.ids[:shared] == list(ids[:shared]):
                common = common_prefix(ids, row.ids, shared, limit)
                if common > length:
                    best, length = row, common

        return best, length

    def clear(self) -> None:
        """Remove all entries of all rows."""
        for rows in self._rows.values():
            for row in rows:
                row.keys.clear()
        self._rows.clear()
