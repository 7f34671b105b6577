"""An LRU cache with a limit in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)
ItemT = TypeVar("ItemT")


class LruCache(Generic[KeyT, ItemT]):
    """An LRU cache with a limit in bytes. The newest item stays, whatever its size."""

    def __init__(self, limit: int, size: Callable[[ItemT], int]) -> None:
        self._limit = limit
        self._size = size
        self._items: OrderedDict[KeyT, ItemT] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: KeyT) -> ItemT | None:
        item = self._items.get(key)
        if item is not None:
            self._items.move_to_end(key)
        return item

    def put(self, key: KeyT, item: ItemT) -> None:
        if (old := self._items.pop(key, None)) is not None:
            self._bytes -= self._size(old)
        self._items[key] = item
        self._bytes += self._size(item)
        while self._bytes > self._limit and len(self._items) > 1:
            self._bytes -= self._size(self._items.popitem(last=False)[1])

    def clear(self) -> None:
        self._items.clear()
        self._bytes = 0
