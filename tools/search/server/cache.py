"""`Lru`: keep what was used last, within a bound."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Lru(Generic[Key, Value]):
    """A cache of a bounded weight that drops what was not used for longest.

    Args:
        most: sum of the weights; 0: nothing is kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self.weight = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key) -> Value | None:
        found = self._kept.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return found[0]

    def put(self, key: Key, value: Value, weight: int = 1) -> None:
        if weight > self._most:
            return
        earlier = self._kept.pop(key, None)
        if earlier is not None:
            self.weight -= earlier[1]
        self._kept[key] = (value, weight)
        self.weight += weight
        while self.weight > self._most:
            _, (_, dropped) = self._kept.popitem(last=False)
            self.weight -= dropped
