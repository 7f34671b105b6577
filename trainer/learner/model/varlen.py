"""Attention over a packed row on CUDA: flash-attention over cumulative lengths.

The kernels take spans, not layouts. A row with a prompt of 3 tokens and two completions of 1 and 2
tokens (the worked example of `trainer.packing.layout`) becomes two calls:

    own     cu 0 3 4 6, longest 3                  every segment causally to itself
    prefix  query rows 3 4 5, key rows 0 1 2       everything after the prompt to the whole prompt
            cu_q 0 3, cu_k 0 3, longest 3 and 3

Their results are merged through the log-sum-exp, as in `trainer.learner.model.attention`. The
backward pass of a part needs only the merged output and log-sum-exp, so the kernels' own backward
passes are exact for it.

Shapes: T packed tokens, X query rows, Y key rows, H heads, G key heads, D head dimension.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from agentloop.errors import ConfigError
from trainer.packing.layout import PackedLayout

KernelName = Literal["auto", "flash_attn", "torch", "plain"]

MAX_HEAD_DIM = 256
"""Largest head dimension of both kernels; it must be a multiple of 8."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Spans of one kernel call: span i is rows `cu_q[i]:cu_q[i + 1]`, and likewise of the keys.

    Attributes:
        cu_q, cu_k: int32 (spans + 1), on the device.
        longest_q, longest_k: rows of the longest span.
        causal: a query attends to the keys up to its own position (both have the same rows); else
            to all keys.
    """

    cu_q: Tensor
    cu_k: Tensor
    longest_q: int
    longest_k: int
    causal: bool


@dataclass(frozen=True, slots=True)
class VarlenLayout:
    """A `PackedLayout` in the form that kernels take.

    Attributes:
        own: each segment to itself.
        prefix: the tokens after each shared prompt to that prompt; None if nothing is shared.
        query_rows, key_rows: int64 (X), (Y); the rows of the pack that `prefix` covers.
    """

    own: Spans
    prefix: Spans | None
    query_rows: Tensor
    key_rows: Tensor

    @classmethod
    def of(cls, layout: PackedLayout, device: torch.device) -> VarlenLayout:
        lengths = [length for _, count, length in layout.runs for _ in range(count)]
        own = Spans(_cumulated(lengths, device), _cumulated(lengths, device), max(lengths), max(lengths), causal=True)

        queries = [(start, length) for start, length, _, _ in layout.prefixes]
        keys = [(start, length) for _, _, start, length in layout.prefixes]
        prefix = None
        if layout.prefixes:
            prefix = Spans(
                _cumulated([length for _, length in queries], device),
                _cumulated([length for _, length in keys], device),
                max(length for _, length in queries),
                max(length for _, length in keys),
                causal=False,
            )

        return cls(own, prefix, _rows(queries, device), _rows(keys, device))


def _cumulated(lengths: list[int], device: torch.device) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(device, non_blocking=True)


def _rows(spans: list[tuple[int, int]], device: torch.device) -> Tensor:
    parts = [np.arange(start, start + length) for start, length in spans] or [np.zeros(0, dtype=np.int64)]
    return torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)


class Kernel(Protocol):
    """Attention over spans. Each key head serves H / G query heads."""

    def forward(self, q_XHD: Tensor, k_YGD: Tensor, v_YGD: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        """Output (X, H, D) and log-sum-exp (H, X) in float32."""
        ...

    def backward(
        self, grad_XHD: Tensor, q_XHD: Tensor, k_YGD: Tensor, v_YGD: Tensor, out_XHD: Tensor, lse_HX: Tensor,
        spans: Spans, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v. Output and log-sum-exp may be those of a larger softmax."""
        ...


class FlashAttnKernel:
    """The kernels of the flash-attn package, 2.7 or newer."""

    def __init__(self) -> None:
        from flash_attn import flash_attn_interface

        self._interface: Any = flash_attn_interface

    def forward(self, q_XHD: Tensor, k_YGD: Tensor, v_YGD: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, _, _ = self._interface._flash_attn_varlen_forward(
            q_XHD, k_YGD, v_YGD, spans.cu_q, spans.cu_k, spans.longest_q, spans.longest_k,
            dropout_p=0.0, softmax_scale=scale, causal=spans.causal,
        )  # fmt: skip
        return out, lse

    def backward(
        self, grad_XHD: Tensor, q_XHD: Tensor, k_YGD: Tensor, v_YGD: Tensor, out_XHD: Tensor, lse_HX: Tensor,
        spans: Spans, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = torch.empty_like(q_XHD), torch.empty_like(k_YGD), torch.empty_like(v_YGD)
        self._interface._flash_attn_varlen_backward(
            grad_XHD, q_XHD, k_YGD, v_YGD, out_XHD, lse_HX, dq, dk, dv, spans.cu_q, spans.cu_k, spans.longest_q,
            spans.longest_k, dropout_p=0.0, softmax_scale=scale, causal=spans.causal, window_size_left=-1,
            window_size_right=-1, softcap=0.0, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return dq, dk, dv


class TorchKernel:
    """The flash kernel that ships with torch, behind `torch.nn.attention.varlen`.

    The public function has no backward pass for a merged log-sum-exp, so the operators are called
    directly.
    """

    def forward(self, q_XHD: Tensor, k_YGD: Tensor, v_YGD: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q_XHD, k_YGD, v_YGD, spans.cu_q, spans.cu_k, spans.longest_q, spans.longest_k, 0.0, spans.causal, False,
            scale=scale,
        )  # fmt: skip
        return out, lse

    def backward(
        self, grad_XHD: Tensor, q_XHD: Tensor, k_YGD: Tensor, v_YGD: Tensor, out_XHD: Tensor, lse_HX: Tensor,
        spans: Spans, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        # The operator requires a random state, but reads it only with dropout.
        state = torch.zeros(2, dtype=torch.uint64, device=q_XHD.device)
        unused = torch.empty(0, device=q_XHD.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad_XHD, q_XHD, k_YGD, v_YGD, out_XHD, lse_HX, spans.cu_q, spans.cu_k, spans.longest_q, spans.longest_k,
            0.0, spans.causal, state, unused, scale=scale,
        )  # fmt: skip
        return dq, dk, dv


def check_kernel(name: KernelName) -> None:
    """Check that the kernel of that name is installed.

    Raises:
        ConfigError: it is not.
    """
    if name == "flash_attn" and not _has_flash_attn():
        raise ConfigError(
            "trainer.attention=flash_attn, but flash-attn 2 is not installed",
            "pip install flash-attn, or set trainer.attention=auto",
        )


def make_kernel(name: KernelName) -> Kernel | None:
    """Return the kernel; `auto`: flash-attn if it is installed, else torch's; None: plain."""
    if name == "plain":
        return None
    if name == "flash_attn" or (name == "auto" and _has_flash_attn()):
        return FlashAttnKernel()
    return TorchKernel()


def kernel_takes(q_THD: Tensor) -> bool:
    """Whether flash kernels accept these queries: half precision, supported head dimension."""
    size = q_THD.shape[-1]
    return q_THD.dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= MAX_HEAD_DIM


def _has_flash_attn() -> bool:
    """Whether the kernels that `FlashAttnKernel` calls are installed.

    flash-attn 4, which SGLang brings, is a package of the same name without them.
    """
    package = "flash_attn"
    return all(importlib.util.find_spec(name) is not None for name in (package, f"{package}.flash_attn_interface"))


class VarlenAttention(torch.autograd.Function):
    """`apply(q_THD, k_TGD, v_TGD, layout, kernel, scale)` -> (T, H, D)."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: VarlenLayout, kernel: Kernel, scale: float
    ) -> Tensor:
        q_THD, k_TGD, v_TGD = q_THD.contiguous(), k_TGD.contiguous(), v_TGD.contiguous()
        out_THD, lse_HT = kernel.forward(q_THD, k_TGD, v_TGD, layout.own, scale)

        if layout.prefix is not None:
            rows, keys = layout.query_rows, layout.key_rows
            part_XHD, lse_HX = kernel.forward(q_THD[rows], k_TGD[keys], v_TGD[keys], layout.prefix, scale)
            own_HX = lse_HT[:, rows]
            # Weight of the prompt's part: exp(lse_p) / (exp(lse_p) + exp(lse_own))
            weight_XH1 = torch.sigmoid(lse_HX - own_HX).T.unsqueeze(-1)
            merged = torch.lerp(out_THD[rows].float(), part_XHD.float(), weight_XH1)
            out_THD[rows] = merged.to(out_THD.dtype)
            lse_HT[:, rows] = torch.logaddexp(own_HX, lse_HX)

        ctx.save_for_backward(q_THD, k_TGD, v_TGD, out_THD, lse_HT)
        ctx.layout, ctx.kernel, ctx.scale = layout, kernel, scale
        return out_THD

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_TGD, v_TGD, out_THD, lse_HT = ctx.saved_tensors
        layout, kernel, scale = ctx.layout, ctx.kernel, ctx.scale
        grad_THD = grad_THD.contiguous()
        dq, dk, dv = kernel.backward(grad_THD, q_THD, k_TGD, v_TGD, out_THD, lse_HT, layout.own, scale)

        if layout.prefix is not None:
            rows, keys = layout.query_rows, layout.key_rows
            pq, pk, pv = kernel.backward(
                grad_THD[rows], q_THD[rows], k_TGD[keys], v_TGD[keys], out_THD[rows], lse_HT[:, rows].contiguous(),
                layout.prefix, scale,
            )  # fmt: skip
            dq.index_add_(0, rows, pq)
            dk.index_add_(0, keys, pk)
            dv.index_add_(0, keys, pv)

        return dq, dk, dv, None, None, None
