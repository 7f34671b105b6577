"""What a server asks of an index."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from agentloop.errors import ConfigError


class Hits(NamedTuple):
    """The passages found for one query, best first; at most as many as were asked for."""

    numbers: list[int]
    scores: list[float]


class Index(Protocol):
    """Finds passages by number. Used by one thread at a time."""

    @property
    def passages(self) -> int: ...

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """Return the hits of each query."""
        ...


def library(name: str) -> Any:
    """Import a library of the extra `search`.

    Raises:
        ConfigError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise ConfigError(
            f"this index needs {name}, which cannot be imported: {exc}", "pip install 'agentloop-rl[search]'"
        ) from exc
