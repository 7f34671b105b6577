"""Attention over the KV cache, for a batch of single tokens (decode) and for chunks of prompts (prefill).

Sizes: T tokens of a pass, A attention heads, H key-value heads, G = A / H, K key dim, D value dim, L tokens looked at.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from rollout_server.engines.torch_engine.cache.kv import KVCache
from rollout_server.engines.torch_engine.cache.rows import Pool, Row
from rollout_server.engines.torch_engine.model.images import ImagePrompt

IMPLEMENTATION = "agentloop_rows"
"""Name under which the attention function is registered in transformers."""


class AttentionPass(Protocol):
    """One forward pass: writes a layer's new keys and values and attends."""

    def attend(
        self, layer: int, q_TAK: torch.Tensor, k_THK: torch.Tensor, v_THD: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Writes the new keys and values into layer `layer`; returns [T, A, D]."""
        ...


class _Segment:
    """The rows of the batch that one pool holds: batch positions `[low, high)`."""

    def __init__(self, pool: Pool, low: int, positions: torch.Tensor) -> None:
        self.pool = pool
        self.low = low
        self.count = pool.active
        self.high = low + self.count
        shape, capacity = pool.shape, pool.capacity
        heads, dims = shape.kv_heads, shape.key_dim
        here = positions[low : self.high]
        rows = torch.arange(self.count, device=here.device)
        # Where each key and value goes, in the flat tensors of a layer.
        k_base = rows * (heads * dims * capacity) + here
        v_base = rows * (heads * capacity) + here
        self.k_index = k_base[:, None] + torch.arange(heads * dims, device=here.device) * capacity
        self.v_index = v_base[:, None] + torch.arange(heads, device=here.device) * capacity
        self.k_flat, self.v_flat = pool.k_flat, pool.v_flat
        self.k_BKC = [k.view(-1, dims, capacity)[: self.count * heads] for k in pool.k]
        self.v_BCD = [v.view(-1, capacity, shape.value_dim)[: self.count * heads] for v in pool.v]
        self._columns = torch.arange(capacity, device=here.device)

    def look(self, seen: torch.Tensor) -> None:
        """Row r sees tokens `[0, seen[r]]`.

        The products run over whole rows, mask and all: memory that is read without gaps comes three times as fast as
        the useful three quarters of it.
        """
        hidden = self._columns > seen[self.low : self.high, None]
        mask = torch.zeros(hidden.shape, device=hidden.device)
        self.mask = mask.masked_fill_(hidden, float("-inf")).view(self.count, 1, 1, -1)


class DecodePass:
    """One token for each active row of every pool, pool after pool.

    The pools' active rows may not change while the pass is used. Rows that are not ready (holes, prompts still being
    filled) are computed and ignored: their key and value go to the first place behind what they hold, every step anew.

    Args:
        cache: its pools' active rows are the batch.
        positions: position of each row's token.
        ready: whether the row really decodes.

    Attributes:
        positions: [B], where each row's token goes in the cache; its rotary position too, but for `offsets`.
        offsets: [B], what rows whose prompts hold images have to add for the rotary position; None: nobody has.
    """

    offsets: torch.Tensor | None = None

    def __init__(self, cache: KVCache, positions: Sequence[int], ready: Sequence[bool], device: torch.device) -> None:
        self.positions = torch.tensor(positions, device=device)
        self._seen = torch.tensor([p if r else 0 for p, r in zip(positions, ready, strict=True)], device=device)
        self._step = None if all(ready) else torch.tensor(ready, dtype=torch.long, device=device)
        self._segments: list[_Segment] = []
        low = 0
        for pool in cache.pools:
            if pool.active:
                self._segments.append(_Segment(pool, low, self.positions))
                low += pool.active
        self._look()

    def advance(self) -> None:
        """The same rows, one token further."""
        if self._step is None:
            self.positions.add_(1)
            self._seen.add_(1)
            for segment in self._segments:
                segment.k_index.add_(1)
                segment.v_index.add_(1)
        else:
            self.positions.add_(self._step)
            self._seen.add_(self._step)
            for segment in self._segments:
                step = self._step[segment.low : segment.high, None]
                segment.k_index.add_(step)
                segment.v_index.add_(step)
        self._look()

    def _look(self) -> None:
        for segment in self._segments:
            segment.look(self._seen)

    def attend(
        self, layer: int, q_TAK: torch.Tensor, k_THK: torch.Tensor, v_THD: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        dtype = q_TAK.dtype
        # Scores in full precision whatever the model's: rounded ones cost more than all other roundings of a layer.
        q_TAK = q_TAK.float() * scaling if scaling != 1.0 else q_TAK.float()
        heads, dim = q_TAK.shape[1:]
        kv_heads = k_THK.shape[1]
        groups = heads // kv_heads
        outs = []
        for segment in self._segments:
            low, high = segment.low, segment.high
            rows = segment.count
            segment.k_flat[layer].scatter_(0, segment.k_index.view(-1), k_THK[low:high].reshape(-1))
            segment.v_flat[layer].index_copy_(0, segment.v_index.view(-1), v_THD[low:high].reshape(-1, v_THD.shape[2]))
            q = q_TAK[low:high].reshape(rows * kv_heads, groups, dim)
            scores = torch.bmm(q, segment.k_BKC[layer].float())
            scores.view(rows, kv_heads, groups, -1).add_(segment.mask)
            weights = torch.softmax(scores, -1)
            outs.append(torch.bmm(weights, segment.v_BCD[layer].float()).to(dtype).view(rows, heads, -1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


@dataclass(slots=True)
class Chunk:
    """Tokens `[start, end)` of a row's sequence, to be put into the cache; `images` when its prompt holds some."""

    row: Row
    start: int
    end: int
    images: ImagePrompt | None = None

    @property
    def ids(self) -> list[int]:
        ids = self.row.ids[self.start : self.end]
        return self.images.real(ids) if self.images else ids


PREFILL_TILE = 64
"""Tokens whose scores exist at one time where prefill computes as decode does."""

MANY_ROWS = 4
"""A product of this many rows or more gives each row the same bits whatever their number. With fewer, MKL takes kernels
of their own, for one row and for two or three."""


@dataclass(slots=True, frozen=True)
class _Tile:
    """Tokens `[low, high)` of a pass, of one row, which look at `columns` tokens at most."""

    row: Row
    low: int
    high: int
    columns: int
    mask: torch.Tensor


class PrefillPass:
    """Chunks of several sequences, one after the other without padding: T is the sum of their lengths.

    Attributes:
        as_decode: attend with the products that `DecodePass` takes, to the same bits: what a token leaves in the cache
            is then a function of the tokens up to it, and not of who computed it when. Else by torch's fused kernel.
    """

    as_decode = False

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = chunks
        self._tiles: list[_Tile] = []
        device = chunks[0].row.pool.k_NRHKC.device
        ids = [token for chunk in chunks for token in chunk.ids]
        self.tokens = torch.tensor(ids, device=device)
        self.positions = torch.cat([torch.arange(chunk.start, chunk.end, device=device) for chunk in chunks])

    def attend(
        self, layer: int, q_TAK: torch.Tensor, k_THK: torch.Tensor, v_THD: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        self.store(layer, k_THK, v_THD)
        out_TAD = q_TAK.new_empty(*q_TAK.shape[:2], v_THD.shape[2])
        if self.as_decode:
            q_TAK = q_TAK * scaling if scaling != 1.0 else q_TAK
            for tile in self._tiles or self._cut():
                self._attend_tile(layer, tile, q_TAK[tile.low : tile.high], out_TAD[tile.low : tile.high])
            return out_TAD
        groups = q_TAK.shape[1] != k_THK.shape[1]
        low = 0
        for chunk in self.chunks:
            count = chunk.end - chunk.start
            high = low + count
            k_HTK, v_HTD = k_THK[low:high].transpose(0, 1), v_THD[low:high].transpose(0, 1)
            mask = None
            if chunk.start:
                # Earlier tokens of the sequence come from the cache; query i sees `start + i + 1` tokens.
                pool, row = chunk.row.pool, chunk.row.row
                k_HTK = pool.k[layer][row, :, :, : chunk.end].transpose(1, 2).contiguous()
                v_HTD = pool.v[layer][row, :, : chunk.end]
                mask = torch.ones(count, chunk.end, dtype=torch.bool, device=q_TAK.device).tril_(chunk.start)
            out = F.scaled_dot_product_attention(
                q_TAK[low:high].transpose(0, 1)[None], k_HTK[None], v_HTD[None],
                attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=groups,
            )  # fmt: skip
            out_TAD[low:high] = out[0].transpose(0, 1)
            low = high
        return out_TAD

    def _cut(self) -> list[_Tile]:
        low = 0
        for chunk in self.chunks:
            start = chunk.start
            while start < chunk.end:
                # As many columns as decode looks at from there: a longer sum may be cut and added up otherwise.
                columns = chunk.row.pool.capacity_for(start + 1)
                end = min(start + PREFILL_TILE, columns, chunk.end)
                seen = torch.arange(start, end, device=self.tokens.device)
                hidden = torch.arange(columns, device=self.tokens.device) > seen[:, None]
                mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))
                self._tiles.append(_Tile(chunk.row, low, low + end - start, columns, mask[:, None]))
                low += end - start
                start = end
        return self._tiles

    @staticmethod
    def _attend_tile(layer: int, tile: _Tile, q_TAK: torch.Tensor, out_TAD: torch.Tensor) -> None:
        """Decode multiplies the G queries of one token and one key-value head at a time; so does this, except where the
        number of rows does not matter."""
        row, pool, columns = tile.row.row, tile.row.pool, tile.columns
        heads = pool.shape.kv_heads
        tokens, groups = q_TAK.shape[0], q_TAK.shape[1] // heads
        k_HKL, v_HLD = pool.k[layer][row, :, :, :columns], pool.v[layer][row, :, :columns]
        if groups >= MANY_ROWS:
            q_HXK = q_TAK.view(tokens, heads, groups, -1).transpose(0, 1).reshape(heads, tokens * groups, -1)
            scores_HTGL = torch.bmm(q_HXK, k_HKL).view(heads, tokens, groups, columns).add_(tile.mask)
            weights_HXL = torch.softmax(scores_HTGL, -1).view(heads, tokens * groups, columns)
            out_HTGD = torch.bmm(weights_HXL, v_HLD).view(heads, tokens, groups, -1)
            out_TAD.view(tokens, heads, groups, -1).copy_(out_HTGD.transpose(0, 1))
            return
        for head in range(heads):
            group = slice(head * groups, (head + 1) * groups)
            scores_TGL = torch.bmm(q_TAK[:, group], k_HKL[head].expand(tokens, -1, -1)).add_(tile.mask)
            weights_TGL = torch.softmax(scores_TGL, -1)
            out_TAD[:, group] = torch.bmm(weights_TGL, v_HLD[head].expand(tokens, -1, -1))

    def store(self, layer: int, k_THK: torch.Tensor, v_THD: torch.Tensor) -> None:
        """Write keys and values only: all that the last layer of a prompt is run for."""
        low = 0
        for chunk in self.chunks:
            high = low + chunk.end - chunk.start
            pool, row = chunk.row.pool, chunk.row.row
            pool.k[layer][row, :, :, chunk.start : chunk.end] = k_THK[low:high].permute(1, 2, 0)
            pool.v[layer][row, :, chunk.start : chunk.end] = v_THD[low:high].transpose(0, 1)
            low = high


_current = threading.local()


@contextmanager
def attending(attention: AttentionPass) -> Iterator[None]:
    """Within it, transformers models of this thread attend through `attention`."""
    _current.attention = attention
    try:
        yield
    finally:
        _current.attention = None


def transformers_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls in every layer.

    Args:
        query: [B, A, S, K], and `key`, `value` likewise with H heads; B is 1 (prefill) or S is 1 (decode).

    Returns:
        [B, S, A, D] and None for the weights, which nobody asked for.
    """
    attention: AttentionPass = _current.attention
    note = getattr(attention, "note", None)
    if note is not None:
        note(kwargs)
    batch, _, steps, dim = query.shape
    q, k, v = (t.transpose(1, 2).reshape(batch * steps, t.shape[1], t.shape[3]) for t in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = attention.attend(layer, q, k, v, dim**-0.5 if scaling is None else scaling)
    return out.view(batch, steps, *out.shape[1:]), None
