"""Test whether a runner's results depend, to the bit, on the tokens alone.

Numerical libraries do not guarantee it: they choose kernels by the shape of a matmul and by the
processor. So it is tested at the start, with the served model and on the serving machine.
"""

from __future__ import annotations

import itertools

import torch

from rollout_server.engines.torch_engine.cache.kv import KVCache
from rollout_server.engines.torch_engine.cache.rows import Row
from rollout_server.engines.torch_engine.model.attention import Chunk, DecodePass, PrefillPass
from rollout_server.engines.torch_engine.model.models import LoadedModel, Runner

LENGTH = 200
"""Tokens of the test sequence: beyond the first three capacities of cache rows."""

OTHERS = (1, 3, 29)
"""Numbers of other rows in the decode batch."""


@torch.inference_mode()
def is_batch_invariant(runner: Runner, loaded: LoadedModel) -> bool:
    """Return whether the results have the same bits, however they are computed.

    The cache of one sequence must not depend on where its prompt is cut, or on whether it was
    prefilled or decoded token by token. The logits of its last token must not depend on other rows
    of the batch.
    """
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
    """One sequence in a new cache; its prompt is prefilled in pieces that end at `cuts`.

    Args:
        others: sequences beside it. They are beginnings of it, and get their keys and values from
            it: what is tested is what they do to its logits, not they themselves.
    """

    def __init__(self, runner: Runner, loaded: LoadedModel, ids: list[int], cuts: list[int], others: int = 0) -> None:
        self._runner = runner
        self._cache = KVCache(loaded.kv, (others + 4) * 256 + loaded.context_length, loaded.context_length)
        lengths = [len(ids), *(len(ids) - 5 * i % (len(ids) - 2) for i in range(1, others + 1))]
        # Also shorter ones, so that several pools are in use.
        self._ids = [ids[:length] for length in lengths]
        self._rows = []
        for number, own in enumerate(self._ids):
            row = self._cache.place(own, cuts[-1] + 1 if number == 0 else len(own), None, 0)
            assert row is not None
            self._rows.append(row)
            if number == 0:
                for start, end in itertools.pairwise([0, *cuts]):
                    runner.prefill(PrefillPass([Chunk(row, start, end)]))
                    row.filled = end
            else:
                _copy_beginning(self._rows[0], row, len(own) - 1)

    def decode(self) -> torch.Tensor:
        """Decode the next token of all sequences; return the first sequence's logits [V]."""
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
        """Return all keys and values of the first sequence."""
        row = self._rows[0]
        k = row.pool.k_NRHKC[:, row.row, :, :, : row.filled].transpose(2, 3)
        return torch.cat([k.flatten(), row.pool.v_NRHCD[:, row.row, :, : row.filled].flatten()])


def _copy_beginning(source: Row, row: Row, count: int) -> None:
    """Fill a row with the keys and values of the first tokens of another."""
    keys, values = source.pool.k_NRHKC, source.pool.v_NRHCD
    row.pool.k_NRHKC[:, row.row, :, :, :count] = keys[:, source.row, :, :, :count]
    row.pool.v_NRHCD[:, row.row, :, :count] = values[:, source.row, :, :count]
    row.filled = count
