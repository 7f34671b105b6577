"""A trial whether a runner's results are, to the bit, functions of the tokens alone.

The numerical libraries promise no such thing. They choose kernels by the shapes of a product and by the processor, so
it is tried at the start, on the model and the machine that are to serve.
"""

from __future__ import annotations

import itertools

import torch

from rollout_server.engines.torch_engine.cache.kv import KVCache
from rollout_server.engines.torch_engine.model.attention import Chunk, DecodePass, PrefillPass
from rollout_server.engines.torch_engine.model.models import LoadedModel, Runner

LENGTH = 200
"""Tokens of the trial: past the first three capacities of cache rows."""

OTHERS = (1, 3, 29)
"""Other rows in the decode batch."""


@torch.inference_mode()
def is_batch_invariant(runner: Runner, loaded: LoadedModel) -> bool:
    """Whether one sequence leaves the same bits in the cache when its prompt is cut, in whatever pieces, and when it is
    decoded token by token; and whether the last token's logits are the same alone and among others."""
    length = min(LENGTH, loaded.context_length - 1)
    ids = [(7 * i * i + 3) % loaded.vocab_size for i in range(length)]
    whole = _Trial(runner, loaded, ids, [length - 1])
    halves = _Trial(runner, loaded, ids, [1, length // 3, length - 1])
    decoded = _Trial(runner, loaded, ids, [length - 9])
    for _ in range(8):
        decoded.decode()
    if not all(torch.equal(whole.cached(), other.cached()) for other in (halves, decoded)):
        return False
    logits = whole.decode()
    return all(torch.equal(logits, trial.decode()) for trial in (halves, decoded)) and all(
        torch.equal(logits, _Trial(runner, loaded, ids, [length - 1], count).decode()) for count in OTHERS
    )


class _Trial:
    """One sequence in a cache of its own, beside `others` shorter ones."""

    def __init__(self, runner: Runner, loaded: LoadedModel, ids: list[int], cuts: list[int], others: int = 0) -> None:
        self._runner = runner
        self._cache = KVCache(loaded.kv, (others + 4) * 256 + loaded.context_length, loaded.context_length)
        lengths = [len(ids), *(len(ids) - 5 * i % (len(ids) - 2) for i in range(1, others + 1))]
        self._ids = [ids[:length] for length in lengths]
        self._rows = []
        for number, own in enumerate(self._ids):
            pieces = cuts if number == 0 else [len(own) - 1]
            row = self._cache.place(own, pieces[-1] + 1, None, 0)
            assert row is not None
            for start, end in itertools.pairwise([0, *pieces]):
                runner.prefill(PrefillPass([Chunk(row, start, end)]))
                row.filled = end
            self._rows.append(row)

    def decode(self) -> torch.Tensor:
        """The first sequence's logits after its next token, [V]."""
        for row in self._rows:
            if row.filled == row.pool.capacity:
                self._cache.grow(row, row.filled + 1)
        rows = [row for pool in self._cache.pools for row in pool.rows[: pool.active]]
        tokens = [row.ids[row.filled] if row is not None else 0 for row in rows]
        batch = DecodePass(self._cache, [row.filled if row is not None else 0 for row in rows], [True] * len(rows),
                           self._rows[0].pool.k_NRHKC.device)  # fmt: skip
        logits = self._runner.decode(torch.tensor(tokens), batch)
        for row in self._rows:
            row.filled += 1
        return logits[rows.index(self._rows[0])]

    def cached(self) -> torch.Tensor:
        row = self._rows[0]
        k = row.pool.k_NRHKC[:, row.row, :, :, : row.filled].transpose(2, 3)
        return torch.cat([k.flatten(), row.pool.v_NRHCD[:, row.row, :, : row.filled].flatten()])
