"""The decode batch: requests that decode together, and the tensors that their steps share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rollout_server.engines.torch_engine.cache.kv import KVCache
from rollout_server.engines.torch_engine.cache.rows import Row
from rollout_server.engines.torch_engine.model.attention import DecodePass
from rollout_server.engines.torch_engine.running import Running
from rollout_server.engines.torch_engine.sampling.sampling import RowSampling, Sampler

IDLE_SHARE = 8
"""A batch is rebuilt when an eighth of its rows has finished; until then finished rows are computed
and ignored."""

_IDLE = RowSampling(temperature=1.0, top_p=1.0, top_k=-1, stream=0)


class Batch:
    """One entry for each active row of the cache; None for holes and for rows whose prompt is still
    being prefilled.

    The entry of a request becomes None when it finishes. Its row stays in the batch until the next
    rebuild, and writes behind the tokens that are kept.
    """

    def __init__(
        self, cache: KVCache, running: dict[int, Running], device: torch.device, never_sampled: Sequence[int] = ()
    ) -> None:
        rows = [row for pool in cache.pools for row in pool.rows[: pool.active]]
        self.entries = [_ready(row, running) for row in rows]
        ready = [entry is not None for entry in self.entries]
        self.ready = sum(ready)
        self._fewest = self._steps_left = 1
        if not self.ready:
            return

        self.tokens = torch.tensor([e.ids[-1] if e else 0 for e in self.entries], device=device)
        self.positions = np.array([len(e.ids) if e else 0 for e in self.entries], dtype=np.uint64)
        self.sampler = Sampler(
            [e.sampling if e else _IDLE for e in self.entries],
            device,
            [e.counted if e else () for e in self.entries],
            never_sampled,
        )

        offsets = [e.images.delta if e and e.images else 0 for e in self.entries]
        self.decoding = DecodePass(cache, [row.filled if row else 0 for row in rows], ready, device, offsets)

        self._steps_left = min(e.row.pool.capacity - e.row.filled for e in self.entries if e and e.row)
        self._fewest = self.ready - self.ready // IDLE_SHARE

    @property
    def worn_out(self) -> bool:
        """Whether a row is full, or too many requests have finished."""
        return self.ready < self._fewest or not self._steps_left

    def advance(self, tokens: torch.Tensor) -> None:
        """Feed the sampled `tokens` [B] to the next step."""
        self.tokens = tokens
        self.sampler.advance(tokens)
        self.positions += np.uint64(1)
        self._steps_left -= 1
        self.decoding.advance()


def _ready(row: Row | None, running: dict[int, Running]) -> Running | None:
    entry = running.get(id(row)) if row is not None and row.in_use else None
    return entry if entry is not None and entry.missing == 0 else None
