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

from rollout_server.engines.torch_engine.kv import KVCache, Pool, Row

IMPLEMENTATION = "agentloop_rows"
"""Name under which the attention function is registered in transformers."""

LENGTH_STEP = 16
"""Decode looks at a multiple of so many tokens: shapes change rarely, and rows start at whole cache lines."""


class AttentionPass(Protocol):
    """One forward pass: writes a layer's new keys and values and attends."""

    def attend(
        self, layer: int, q_TAK: torch.Tensor, k_THK: torch.Tensor, v_THD: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Returns [T, A, D]."""
        ...


class _Segment:
    """The rows of the batch that one pool holds: batch positions `[low, high)`."""

    def __init__(self, pool: Pool, low: int, positions: torch.Tensor) -> None:
        self.pool = pool
        self.low = low
        self.count = pool.active
        self.high = low + self.count
        shape, capacity = pool.shape, pool.capacity
        rows = torch.arange(self.count, device=positions.device)
        heads, dims = shape.kv_heads, shape.key_dim
        k_base = rows * (heads * dims * capacity) + positions
        v_base = rows * (heads * capacity) + positions
        self.k_index = (k_base[:, None] + torch.arange(heads * dims, device=rows.device) * capacity).view(-1)
        v_index = v_base[:, None] + torch.arange(heads, device=rows.device) * capacity
        self.v_index = v_index.view(-1)
        self.k_flat = [k.view(-1) for k in pool.k]
        self.v_flat = [v.view(-1, shape.value_dim) for v in pool.v]
        self.k_HKC = [k.view(-1, dims, capacity)[: self.count * heads] for k in pool.k]
        self.v_HCD = [v.view(-1, capacity, shape.value_dim)[: self.count * heads] for v in pool.v]
        self.arange = torch.arange(capacity, device=rows.device)
        self.look(positions)

    def look(self, positions: torch.Tensor) -> None:
        """Set how far this step looks: position p of a row sees tokens `[0, p]`."""
        self.longest = int(positions.max()) + 1
        self._set_mask(positions)

    def advance(self, positions: torch.Tensor) -> None:
        """The same rows, one token further."""
        self.k_index.add_(1)
        self.v_index.add_(1)
        self.longest += 1
        self._set_mask(positions)

    def _set_mask(self, positions: torch.Tensor) -> None:
        self.length = min(-(-self.longest // LENGTH_STEP) * LENGTH_STEP, self.pool.capacity)
        hidden = self.arange[: self.length] > positions[:, None]
        dtype = self.pool.shape.dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
        self.mask = mask.view(self.count, 1, 1, self.length)


class DecodePass:
    """One token for each active row of every pool, pool after pool.

    Args:
        cache: its pools' active rows are the batch, and may not change while the pass is used.
        positions: [T] position of each row's token; the pass keeps the tensor and `advance` counts it up.
    """

    def __init__(self, cache: KVCache, positions: torch.Tensor) -> None:
        self.positions = positions
        self._segments: list[_Segment] = []
        low = 0
        for pool in cache.pools:
            if pool.active:
                self._segments.append(_Segment(pool, low, positions[low : low + pool.active]))
                low += pool.active

    def advance(self) -> None:
        """The same rows, one token further."""
        self.positions.add_(1)
        for segment in self._segments:
            segment.advance(self.positions[segment.low : segment.high])

    def attend(
        self, layer: int, q_TAK: torch.Tensor, k_THK: torch.Tensor, v_THD: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        if scaling != 1.0:
            q_TAK = q_TAK * scaling
        count, heads, dim = q_TAK.shape
        kv_heads = k_THK.shape[1]
        groups = heads // kv_heads
        outs = []
        for segment in self._segments:
            low, high, length = segment.low, segment.high, segment.length
            rows = segment.count
            segment.k_flat[layer].scatter_(0, segment.k_index, k_THK[low:high].reshape(-1))
            segment.v_flat[layer].index_copy_(0, segment.v_index, v_THD[low:high].reshape(-1, v_THD.shape[2]))
            q = q_TAK[low:high].reshape(rows * kv_heads, groups, dim)
            scores = torch.bmm(q, segment.k_HKC[layer][:, :, :length])
            scores.view(rows, kv_heads, groups, length).add_(segment.mask)
            weights = torch.softmax(scores, -1)
            outs.append(torch.bmm(weights, segment.v_HCD[layer][:, :length]).view(rows, heads, -1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


@dataclass(slots=True)
class Chunk:
    """Tokens `[start, end)` of a row's sequence, to be put into the cache."""

    row: Row
    start: int
    end: int


class PrefillPass:
    """Chunks of several sequences, one after the other without padding: T is the sum of their lengths."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = chunks
        device = chunks[0].row.pool.k_NRHKC.device
        ids = [token for chunk in chunks for token in chunk.row.ids[chunk.start : chunk.end]]
        self.tokens = torch.tensor(ids, device=device)
        self.positions = torch.cat([torch.arange(chunk.start, chunk.end, device=device) for chunk in chunks])

    def attend(
        self, layer: int, q_TAK: torch.Tensor, k_THK: torch.Tensor, v_THD: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        out_TAD = q_TAK.new_empty(*q_TAK.shape[:2], v_THD.shape[2])
        groups = q_TAK.shape[1] != k_THK.shape[1]
        low = 0
        for chunk in self._chunks:
            count = chunk.end - chunk.start
            high = low + count
            k_cache, v_cache = chunk.row.pool.k[layer][chunk.row.row], chunk.row.pool.v[layer][chunk.row.row]
            k_HTK, v_HTD = k_THK[low:high].transpose(0, 1), v_THD[low:high].transpose(0, 1)
            k_cache[:, :, chunk.start : chunk.end] = k_HTK.transpose(1, 2)
            v_cache[:, chunk.start : chunk.end] = v_HTD
            mask = None
            if chunk.start:
                # Earlier tokens of the sequence come from the cache; query i sees `start + i + 1` tokens.
                k_HTK = k_cache[:, :, : chunk.end].transpose(1, 2).contiguous()
                v_HTD = v_cache[:, : chunk.end]
                mask = torch.ones(count, chunk.end, dtype=torch.bool, device=q_TAK.device).tril_(chunk.start)
            out = F.scaled_dot_product_attention(
                q_TAK[low:high].transpose(0, 1)[None], k_HTK[None], v_HTD[None],
                attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=groups,
            )  # fmt: skip
            out_TAD[low:high] = out[0].transpose(0, 1)
            low = high
        return out_TAD


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
    batch, _, steps, dim = query.shape
    packed = (t.transpose(1, 2).reshape(batch * steps, t.shape[1], t.shape[3]) for t in (query, key, value))
    out = attention.attend(module.layer_idx, *packed, dim**-0.5 if scaling is None else scaling)  # type: ignore[arg-type]
    return out.view(batch, steps, *out.shape[1:]), None
