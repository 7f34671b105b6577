"""Attention over a packed row, registered in transformers under the name `ATTENTION`.

All other layers treat the row as T independent tokens. In attention, each segment attends causally
to itself and, if its prompt is shared, to that prompt. The two partial results are merged through
their log-sum-exp:

    out = sum_i exp(lse_i - lse) out_i        lse = log sum_i exp(lse_i)

(ring attention, arXiv 2310.01889, does the same over devices). The backward pass of a part needs
only the merged `out` and `lse`. Each part therefore uses the fused kernel forward and backward, and
no score matrix is ever stored.

Shapes: T packed tokens, H heads, G key heads, D head dimension, B segments of a run, L their
length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from agentloop.errors import ModelError
from trainer.learner.model.varlen import (
    Kernel,
    KernelName,
    VarlenAttention,
    VarlenLayout,
    check_kernel,
    kernel_takes,
    make_kernel,
)
from trainer.packing.layout import PackedLayout

ATTENTION = "agentloop_packed"

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Attention:
    """The attention of one model over packed rows (`trainer.attention`).

    Args:
        name: `auto` is the fastest kernel that is installed; `plain` is masked attention.
        device: where the model computes.

    Raises:
        ConfigError: the kernel is not installed.
    """

    def __init__(self, name: KernelName = "auto", device: torch.device | None = None) -> None:
        check_kernel(name)
        self.fused_on_cpu = name != "plain"
        self.kernel: Kernel | None = make_kernel(name) if device is not None and device.type == "cuda" else None


class PackedRow:
    """One packed row in a forward pass: its layout, and the model's attention over it.

    One object serves all layers of a pass, so that the layout is converted for a kernel once.
    """

    def __init__(self, layout: PackedLayout, attention: Attention) -> None:
        self.layout = layout
        self._attention = attention
        self._spans: VarlenLayout | None = None

    def attend(self, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, scale: float) -> Tensor:
        """Attention output (T, H, D); G key heads, each of which serves H / G query heads."""
        kernel = self._attention.kernel
        if kernel is not None and q_THD.device.type == "cuda" and kernel_takes(q_THD):
            spans = self._spans_on(q_THD.device)
            # The ignored error: torch does not annotate Function.apply.
            merged: Tensor = VarlenAttention.apply(q_THD, k_TGD, v_TGD, spans, kernel, scale)  # type: ignore[no-untyped-call]
            return merged

        k_THD, v_THD = k_TGD, v_TGD
        if k_TGD.shape[1] != q_THD.shape[1]:
            shared = q_THD.shape[1] // k_TGD.shape[1]
            k_THD, v_THD = k_TGD.repeat_interleave(shared, dim=1), v_TGD.repeat_interleave(shared, dim=1)

        if q_THD.device.type == "cpu" and self._attention.fused_on_cpu:
            out: Tensor = _PackedAttention.apply(q_THD, k_THD, v_THD, self.layout, scale)  # type: ignore[no-untyped-call]  # as above
            return out
        return portable_attention(q_THD, k_THD, v_THD, self.layout, scale)

    def _spans_on(self, device: torch.device) -> VarlenLayout:
        if self._spans is None:
            self._spans = VarlenLayout.of(self.layout, device)
        return self._spans


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_row: PackedRow,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over a packed row; the signature is that of transformers' attention functions.

    Args:
        query: (1, H, T, D), after position embedding.
        key, value: (1, G, T, D); each key head serves H / G query heads.
        packed_row: the row's layout and the model's kernel, passed to the decoder as a keyword
            argument.
        scaling: factor on the scores.
        kwargs: other arguments of transformers; `sliding_window`, `softcap` and `s_aux` would
            change the result.

    Returns:
        (1, T, H, D) and no attention weights.

    Raises:
        ModelError: the model's attention has a feature that the packed path does not compute.
    """
    layout = packed_row.layout
    longest = max(length for _, _, length in layout.runs)
    longest += max((prompt for _, _, _, prompt in layout.prefixes), default=0)
    window = kwargs.get("sliding_window")
    if (window is not None and window < longest) or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise ModelError(
            f"{type(module).__name__} has a sliding window shorter than the sequence, logit capping or attention sinks",
            "the trainer computes full causal attention only: use another model",
        )

    q_THD, k_TGD, v_TGD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return packed_row.attend(q_THD, k_TGD, v_TGD, scaling).unsqueeze(0), None


# transformers looks attention functions up in one table per process. The function registered here
# has no state: whatever depends on the model or the row is passed as `packed_row`.
AttentionInterface.register(ATTENTION, packed_attention)


class _PackedAttention(torch.autograd.Function):
    """The CPU path: torch's flash kernel on views of the row, without padding or copies."""

    @staticmethod
    def forward(ctx: Any, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, layout: PackedLayout, scale: float) -> Tensor:
        q_THD, k_THD, v_THD = q_THD.contiguous(), k_THD.contiguous(), v_THD.contiguous()
        out_THD = torch.empty_like(q_THD)
        lse_TH = torch.empty(q_THD.shape[:2], dtype=torch.float32)
        for run in layout.runs:
            out, lse = _cpu_forward(
                _run(q_THD, run), _run(k_THD, run), _run(v_THD, run), 0.0, is_causal=True, scale=scale
            )
            _run(out_THD, run).copy_(out)
            _run(lse_TH.unsqueeze(-1), run).copy_(lse.unsqueeze(-1))

        # After the runs: a prompt's part is merged into the segment's own.
        for start, length, prompt_start, prompt_length in layout.prefixes:
            rows, prompt = slice(start, start + length), slice(prompt_start, prompt_start + prompt_length)
            out, lse = _cpu_forward(
                _span(q_THD, rows), _span(k_THD, prompt), _span(v_THD, prompt), 0.0, is_causal=False, scale=scale
            )
            # Weight of the prompt's part: exp(lse_p) / (exp(lse_p) + exp(lse_own))
            lse_LH = lse[0].transpose(0, 1)
            weight_LH = torch.sigmoid(lse_LH - lse_TH[rows])
            part_LHD = out[0].transpose(0, 1)
            out_THD[rows] = torch.lerp(out_THD[rows].float(), part_LHD.float(), weight_LH.unsqueeze(-1))
            torch.logaddexp(lse_TH[rows], lse_LH, out=lse_TH[rows])

        ctx.save_for_backward(q_THD, k_THD, v_THD, out_THD, lse_TH)
        ctx.layout, ctx.scale = layout, scale
        return out_THD

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_THD, v_THD, out_THD, lse_TH = ctx.saved_tensors
        grad_THD = grad_THD.contiguous()
        lse_TH1 = lse_TH.unsqueeze(-1)
        dq_THD, dk_THD, dv_THD = torch.empty_like(q_THD), torch.empty_like(k_THD), torch.empty_like(v_THD)

        # Each row is in one run, so these gradients are written; those of shared prompts are added
        # afterwards.
        for run in ctx.layout.runs:
            dq, dk, dv = _cpu_backward(
                _run(grad_THD, run), _run(q_THD, run), _run(k_THD, run), _run(v_THD, run), _run(out_THD, run),
                _run(lse_TH1, run).squeeze(-1), 0.0, is_causal=True, scale=ctx.scale,
            )  # fmt: skip
            _run(dq_THD, run).copy_(dq)
            _run(dk_THD, run).copy_(dk)
            _run(dv_THD, run).copy_(dv)

        for start, length, prompt_start, prompt_length in ctx.layout.prefixes:
            rows, prompt = slice(start, start + length), slice(prompt_start, prompt_start + prompt_length)
            dq, dk, dv = _cpu_backward(
                _span(grad_THD, rows), _span(q_THD, rows), _span(k_THD, prompt), _span(v_THD, prompt),
                _span(out_THD, rows), _span(lse_TH1, rows).squeeze(-1), 0.0, is_causal=False, scale=ctx.scale,
            )  # fmt: skip
            _span(dq_THD, rows).add_(dq)
            _span(dk_THD, prompt).add_(dk)
            _span(dv_THD, prompt).add_(dv)

        return dq_THD, dk_THD, dv_THD, None, None


def _run(tensor_THD: Tensor, run: tuple[int, int, int]) -> Tensor:
    """A run of equally long segments as a (B, H, L, D) view."""
    start, count, length = run
    rows = tensor_THD[start : start + count * length]
    return rows.view(count, length, *rows.shape[1:]).transpose(1, 2)


def _span(tensor_THD: Tensor, rows: slice) -> Tensor:
    """Rows of the pack as a (1, H, L, D) view."""
    return tensor_THD[rows].transpose(0, 1).unsqueeze(0)


def portable_attention(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, layout: PackedLayout, scale: float) -> Tensor:
    """Compute the same with masked scaled-dot-product attention, segment by segment.

    It runs on any device, and tests compare the kernels against it.
    """
    parts = []
    for start, count, length in layout.runs:
        for begin in range(start, start + count * length, length):
            rows = slice(begin, begin + length)
            keys, values = k_THD[rows], v_THD[rows]
            mask = torch.ones(length, length, dtype=torch.bool, device=q_THD.device).tril()

            for first, span, prompt_start, prompt_length in layout.prefixes:
                if first <= begin < first + span:
                    prompt = slice(prompt_start, prompt_start + prompt_length)
                    keys, values = torch.cat([k_THD[prompt], keys]), torch.cat([v_THD[prompt], values])
                    mask = torch.cat([mask.new_ones(length, prompt_length), mask], dim=1)

            q, k, v = (tensor.transpose(0, 1) for tensor in (q_THD[rows], keys, values))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            parts.append(out.transpose(0, 1))
    return torch.cat(parts)
