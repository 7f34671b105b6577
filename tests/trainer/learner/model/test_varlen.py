"""The CUDA path's own part: layouts become spans, and partial results are merged exactly, forward and backward.

The kernel here computes in plain torch what flash-attention does over spans, from the log-sum-exp it is given.
"""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from agentloop.config import TrainerConfig
from agentloop.errors import ConfigError
from trainer.learner.model.attention import Attention, portable_attention
from trainer.learner.model.varlen import (
    Spans,
    TorchKernel,
    VarlenAttention,
    VarlenLayout,
    check_kernel,
    kernel_takes,
    make_kernel,
)
from trainer.packing.layout import PackedLayout

CPU = torch.device("cpu")
LAYOUT = PackedLayout(
    runs=[(0, 1, 5), (5, 3, 4), (17, 1, 7), (24, 2, 6), (36, 1, 3), (39, 2, 2), (43, 1, 4)],
    prefixes=[(5, 19, 0, 5), (39, 4, 36, 3)],
)
TOKENS = 47


class PlainKernel:
    """Attention over spans, one span after the other."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
        for rows, keys in self._spans(spans):
            scores, values = self._scores(q, k, v, rows, keys, spans, scale)
            lse[:, rows] = scores.logsumexp(-1)
            out[rows] = (scores.softmax(-1) @ values).transpose(0, 1)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        shared = q.shape[1] // k.shape[1]
        for rows, keys in self._spans(spans):
            scores, values = self._scores(q, k, v, rows, keys, spans, scale)
            weights = (scores - lse[:, rows, None]).exp()
            g = grad[rows].transpose(0, 1)
            slope = weights * (g @ values.mT - (grad[rows] * out[rows]).sum(-1).T.unsqueeze(-1)) * scale
            dq[rows] = (slope @ k[keys].repeat_interleave(shared, 1).transpose(0, 1)).transpose(0, 1)
            for into, part in ((dk, slope.mT @ q[rows].transpose(0, 1)), (dv, weights.mT @ g)):
                into[keys] = part.unflatten(0, (k.shape[1], shared)).sum(1).transpose(0, 1)
        return dq, dk, dv

    @staticmethod
    def _spans(spans: Spans) -> list[tuple[slice, slice]]:
        q, k = spans.cu_q.tolist(), spans.cu_k.tolist()
        assert max(b - a for a, b in itertools.pairwise(q)) == spans.longest_q
        assert max(b - a for a, b in itertools.pairwise(k)) == spans.longest_k
        return [(slice(q[i], q[i + 1]), slice(k[i], k[i + 1])) for i in range(len(q) - 1)]

    @staticmethod
    def _scores(
        q: Tensor, k: Tensor, v: Tensor, rows: slice, keys: slice, spans: Spans, scale: float
    ) -> tuple[Tensor, Tensor]:
        shared = q.shape[1] // k.shape[1]
        wide = (tensor[keys].repeat_interleave(shared, 1).transpose(0, 1) for tensor in (k, v))
        keys_HYD, values_HYD = wide
        scores = q[rows].transpose(0, 1) @ keys_HYD.mT * scale
        if spans.causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        return scores, values_HYD


def test_the_worked_example_of_the_docstring() -> None:
    spans = VarlenLayout.of(PackedLayout(runs=[(0, 1, 3), (3, 1, 1), (4, 1, 2)], prefixes=[(3, 3, 0, 3)]), CPU)
    assert spans.own.cu_q.tolist() == spans.own.cu_k.tolist() == [0, 3, 4, 6]
    assert spans.own.cu_q.dtype == torch.int32
    assert (spans.own.longest_q, spans.own.longest_k, spans.own.causal) == (3, 3, True)
    assert spans.query_rows.tolist() == [3, 4, 5]
    assert spans.key_rows.tolist() == [0, 1, 2]
    assert spans.prefix is not None and not spans.prefix.causal
    assert spans.prefix.cu_q.tolist() == spans.prefix.cu_k.tolist() == [0, 3]


def test_a_row_without_shared_prompts_is_one_call() -> None:
    assert VarlenLayout.of(PackedLayout(runs=[(0, 2, 3)]), CPU).prefix is None


@pytest.mark.parametrize("layout", [LAYOUT, PackedLayout(runs=LAYOUT.runs)])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_merged_spans_equal_masked_attention_forward_and_backward(layout: PackedLayout, key_heads: int) -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(TOKENS, heads, 8, requires_grad=True) for heads in (4, key_heads, key_heads))
    weights = torch.randn(TOKENS, 4, 8)
    out = VarlenAttention.apply(q, k, v, VarlenLayout.of(layout, CPU), PlainKernel(), 0.3)
    ours = torch.autograd.grad((out * weights).sum(), (q, k, v))
    wide = [tensor.double().repeat_interleave(4 // tensor.shape[1], dim=1) for tensor in (q, k, v)]
    expected = portable_attention(*wide, layout, 0.3)
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    assert (out - expected).abs().max() < 1e-6
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 5e-6


def test_torchs_operators_take_what_they_are_given() -> None:
    """On meta: the order and the kinds of arguments, and the shapes of what comes back."""
    layout = VarlenLayout.of(LAYOUT, CPU)
    assert layout.prefix is not None
    q, kv = (torch.empty(TOKENS, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    kernel = TorchKernel()
    for spans in (layout.own, layout.prefix):
        there = replace(spans, cu_q=spans.cu_q.to("meta"), cu_k=spans.cu_k.to("meta"))
        out, lse = kernel.forward(q, kv, kv, there, 0.125)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, (4, TOKENS), torch.float32)
        grads = kernel.backward(torch.empty_like(out), q, kv, kv, out, lse, there, 0.125)
        assert [grad.shape for grad in grads] == [q.shape, kv.shape, kv.shape]


def test_flash_attn_4_is_not_taken_for_flash_attn_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(make_kernel("auto"), TorchKernel)
    with pytest.raises(ConfigError, match="flash-attn 2 is not installed"):
        check_kernel("flash_attn")


def test_a_kernel_that_cannot_run_here_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"CUDA kernel and trainer\.device is cpu"):
        TrainerConfig(attention="torch")
    assert TrainerConfig(attention="torch", device="cuda").attention == "torch"
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(ConfigError, match="not installed"):
            Attention("flash_attn")
    assert not kernel_takes(torch.zeros(1, 1, 64))
    assert kernel_takes(torch.zeros(1, 1, 64, dtype=torch.bfloat16))
    assert not kernel_takes(torch.zeros(1, 1, 20, dtype=torch.bfloat16))
