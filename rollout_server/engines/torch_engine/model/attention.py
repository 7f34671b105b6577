"""Attention over the KV cache, for a batch of single tokens (decode) and for chunks of prompts
(prefill).

Sizes: B rows of a batch, T tokens of a pass, A attention heads, H key-value heads, G = A / H, K key
dim, D value dim, L tokens attended to, C capacity of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from rollout_server.engines.torch_engine.cache.kv import KVCache
from rollout_server.engines.torch_engine.cache.rows import Pool, Row
from rollout_server.engines.torch_engine.model.images import ImagePrompt


class AttentionPass(Protocol):
    """The attention of one forward pass, layer by layer."""

    def attend(
        self, layer: int, q_TAK: torch.Tensor, k_THK: torch.Tensor, v_THD: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Write the tokens' keys and values into the cache of layer `layer`, then attend; returns
        [T, A, D]."""
        ...


class _Segment:
    """The rows of a decode batch that lie in one pool: rows `[low, high)` of the batch."""

    def __init__(self, pool: Pool, low: int, positions: torch.Tensor) -> None:
        self.pool = pool
        self.low = low
        self.count = pool.active
        self.high = low + self.count
        shape, capacity = pool.shape, pool.capacity
        heads, dims = shape.kv_heads, shape.key_dim
        here = positions[low : self.high]
        rows = torch.arange(self.count, device=here.device)

        # Where each new key and value goes in the flat tensors of a layer.
        k_base = rows * (heads * dims * capacity) + here
        v_base = rows * (heads * capacity) + here
        self.k_index = k_base[:, None] + torch.arange(heads * dims, device=here.device) * capacity
        self.v_index = v_base[:, None] + torch.arange(heads, device=here.device) * capacity

        self.k_flat, self.v_flat = pool.k_flat, pool.v_flat
        self.k_BKC = [k.view(-1, dims, capacity)[: self.count * heads] for k in pool.k]
        self.v_BCD = [v.view(-1, capacity, shape.value_dim)[: self.count * heads] for v in pool.v]
        self._columns = torch.arange(capacity, device=here.device)

    def set_mask(self, last: torch.Tensor) -> None:
        """Let row r attend to tokens `[0, last[r]]`.

        The matmuls run over whole rows and mask the rest: reading memory without gaps is three
        times as fast as reading only the useful three quarters of it.
        """
        hidden = self._columns > last[self.low : self.high, None]
        mask = torch.zeros(hidden.shape, device=hidden.device)
        self.mask = mask.masked_fill_(hidden, float("-inf")).view(self.count, 1, 1, -1)


class DecodePass:
    """One token for each active row of every pool, pool after pool.

    The pools' active rows must not change while the pass is used. Rows that are not ready (holes,
    and prompts still being prefilled) are computed and ignored: each step writes their key and
    value to the first place behind the tokens they hold.

    Args:
        cache: the active rows of its pools are the batch.
        positions: position of each row's token.
        ready: whether each row decodes.
        offsets: difference of each row's rotary position, which is not 0 after images.

    Attributes:
        positions: [B], where each row's token goes in the cache; also its rotary position, before
            `offsets`.
        offsets: [B]; None if all are 0.
    """

    def __init__(
        self,
        cache: KVCache,
        positions: Sequence[int],
        ready: Sequence[bool],
        device: torch.device,
        offsets: Sequence[int] = (),
    ) -> None:
        self.offsets = torch.tensor(offsets, device=device) if any(offsets) else None
        self.positions = torch.tensor(positions, device=device)
        self._last = torch.tensor([p if r else 0 for p, r in zip(positions, ready, strict=True)], device=device)
        self._step = None if all(ready) else torch.tensor(ready, dtype=torch.long, device=device)

        self._segments: list[_Segment] = []
        low = 0
        for pool in cache.pools:
            if pool.active:
                self._segments.append(_Segment(pool, low, self.positions))
                low += pool.active
        self._set_masks()

    def advance(self) -> None:
        """Advance to the next token of the same rows."""
        if self._step is None:
            self.positions.add_(1)
            self._last.add_(1)
            for segment in self._segments:
                segment.k_index.add_(1)
                segment.v_index.add_(1)
        else:
            self.positions.add_(self._step)
            self._last.add_(self._step)
            for segment in self._segments:
                step = self._step[segment.low : segment.high, None]
                segment.k_index.add_(step)
                segment.v_index.add_(step)
        self._set_masks()

    def _set_masks(self) -> None:
        for segment in self._segments:
            segment.set_mask(self._last)

    def attend(
        self, layer: int, q_TAK: torch.Tensor, k_THK: torch.Tensor, v_THD: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        dtype = q_TAK.dtype
        # Scores in float32 for every dtype: rounding them loses more than all other roundings of a
        # layer.
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
    """Tokens `[start, end)` of a row's sequence to prefill; `images` if its prompt contains
    some."""

    row: Row
    start: int
    end: int
    images: ImagePrompt | None = None

    @property
    def ids(self) -> list[int]:
        """The tokens' ids in the vocabulary."""
        ids = self.row.ids[self.start : self.end]
        return self.images.real(ids) if self.images else ids


PREFILL_TILE = 64
"""Tokens whose scores are in memory at one time when prefill computes with the matmuls of
decode."""

MANY_ROWS = 4
"""A matmul of at least this many rows gives each row the same bits, whatever their number. For one
row, and for two or three, MKL uses other kernels."""


@dataclass(slots=True, frozen=True)
class _Tile:
    """Tokens `[low, high)` of a pass, all of one row, which attend to at most `columns` tokens."""

    row: Row
    low: int
    high: int
    columns: int
    mask: torch.Tensor


class PrefillPass:
    """Chunks of several sequences, concatenated without padding: T is the sum of their lengths.

    Attributes:
        as_decode: attend with the matmuls of `DecodePass`, to the same bits. The cache entries of a
            token then depend only on the tokens up to it, not on how the prompt was cut. If False,
            attend with torch's fused kernel.
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
                # Earlier tokens of the sequence come from the cache; query i attends to `start + i
                # + 1` tokens.
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
        """Cut the chunks into tiles."""
        low = 0
        for chunk in self.chunks:
            start = chunk.start
            while start < chunk.end:
                # As many columns as decode would use at this position: a longer sum may be split in
                # another way.
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
        """Attend for one tile, into `out_TAD`.

        Decode multiplies the G queries of one token and one key-value head at a time. So does this,
        except where the number of rows does not change the bits.
        """
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
        """Write keys and values without attending: enough for a prompt in the last layer."""
        low = 0
        for chunk in self.chunks:
            high = low + chunk.end - chunk.start
            pool, row = chunk.row.pool, chunk.row.row
            pool.k[layer][row, :, :, chunk.start : chunk.end] = k_THK[low:high].permute(1, 2, 0)
            pool.v[layer][row, :, chunk.start : chunk.end] = v_THD[low:high].transpose(0, 1)
            low = high
