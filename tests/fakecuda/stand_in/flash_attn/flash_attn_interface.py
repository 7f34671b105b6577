"""The functions that `FlashAttnKernel` calls, with the checks of flash-attn 2.7's C++ interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

calls: list[str] = []


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int) -> None:
    assert {t.device for t in (q, k, v, cu_q, cu_k)} == {q.device} and q.device.type == "cuda"
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous()
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    assert q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    assert q.shape[1] % k.shape[1] == 0 and k.shape == v.shape
    for cu, rows, longest in ((cu_q, len(q), longest_q), (cu_k, len(k), longest_k)):
        lengths = cu.diff().tolist()
        assert sum(lengths) == rows and max(lengths) == longest


def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int, *, dropout_p: float,
    softmax_scale: float, causal: bool,
) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
    _check(q, k, v, cu_q, cu_k, longest_q, longest_k)
    calls.append("forward")
    return torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32), None, None


def _flash_attn_varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int, **options: Any,
) -> None:  # fmt: skip
    _check(q, k, v, cu_q, cu_k, longest_q, longest_k)
    assert {t.dtype for t in (grad, out, dq, dk, dv)} == {q.dtype}
    assert {t.device for t in (grad, out, lse)} == {q.device}
    assert lse.dtype == torch.float32 and tuple(lse.shape) == (q.shape[1], len(q)) and lse.is_contiguous()
    assert grad.shape == out.shape == dq.shape == q.shape and dk.shape == dv.shape == k.shape
    assert set(options) == {
        "dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right", "softcap", "alibi_slopes",
        "deterministic",
    }  # fmt: skip
    calls.append("backward")
