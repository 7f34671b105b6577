"""Matrix products of a rank in float32 on a CPU: torch's own, or oneDNN's where those are faster.

torch multiplies float32 matrices with MKL, which uses AVX-512 on Intel's processors only. oneDNN, which is part of
torch too, uses it wherever it is there.

oneDNN compiles code for each shape and keeps it, more than half a megabyte each time, and no two micro-batches have the
same number of tokens. So it gets blocks of ROWS rows, one shape for each weight, and MKL the rows that are left over.

Shapes: T rows, K inputs, N outputs.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from agentloop.errors import ConfigError

ROWS = 256
_NONE: tuple[str, list[float], str] = ("none", [], "")
"""No activation, its arguments, its algorithm."""

_onednn = False


def use_products(choice: Literal["auto", "torch", "onednn"]) -> None:
    """Choose for this process; `auto` is oneDNN's where MKL would leave AVX-512 unused.

    Raises:
        ConfigError: this torch has no oneDNN.
    """
    global _onednn
    if choice == "onednn" and not torch.backends.mkldnn.is_available():
        raise ConfigError("trainer.matmul: onednn: this torch was built without oneDNN", "choose auto")
    _onednn = choice == "onednn" or (choice == "auto" and _mkl_is_slow())


def use_in(module: nn.Module) -> None:
    """Let every linear layer inside `module` multiply as `use_products` has said."""
    for layer in module.modules():
        if _onednn and type(layer) is nn.Linear:
            layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]


def product(rows_TK: Tensor, weight_NK: Tensor, out: Tensor | None = None) -> Tensor:
    """`rows weight^T`, (T, N), without a gradient."""
    if out is None:
        out = rows_TK.new_empty(len(rows_TK), len(weight_NK))
    done = 0
    if _suits(rows_TK, weight_NK):
        for done in range(ROWS, len(rows_TK) + 1, ROWS):
            block = slice(done - ROWS, done)
            out[block] = torch.ops.mkldnn._linear_pointwise(rows_TK[block], weight_NK, None, *_NONE)
    if done < len(rows_TK):
        torch.mm(rows_TK[done:], weight_NK.T, out=out[done:])
    return out


def add_product(into_NK: Tensor, left_TN: Tensor, right_TK: Tensor) -> Tensor:
    """`into += left^T right`, in place: what T tokens add to the gradient of a weight."""
    done = 0
    if _suits(left_TN, right_TK):
        for done in range(ROWS, len(left_TN) + 1, ROWS):
            block = slice(done - ROWS, done)
            into_NK += torch.ops.mkldnn._linear_pointwise(left_TN[block].T, right_TK[block].T, None, *_NONE)
    if done < len(left_TN):
        into_NK += left_TN[done:].T @ right_TK[done:]
    return into_NK


def _suits(a: Tensor, b: Tensor) -> bool:
    return _onednn and a.device.type == "cpu" and a.dtype == b.dtype == torch.float32


def _mkl_is_slow() -> bool:
    """A processor with AVX-512 that is not Intel's."""
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return False
    vendor = next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "GenuineIntel")
    return vendor != "GenuineIntel"


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows_TK, weight_NK)
        out_TN = product(rows_TK, weight_NK)
        return out_TN if bias_N is None else out_TN.add_(bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows_TK, weight_NK = ctx.saved_tensors
        for_rows, for_weight, for_bias = ctx.needs_input_grad
        grad_TN = grad_TN.contiguous()
        return (
            product(grad_TN, weight_NK.T) if for_rows else None,
            add_product(torch.zeros_like(weight_NK), grad_TN, rows_TK) if for_weight else None,
            grad_TN.sum(0) if for_bias else None,
        )


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    rows_TK = inputs.reshape(-1, inputs.shape[-1])
    if len(rows_TK) < ROWS or not _suits(rows_TK, layer.weight):
        return functional.linear(inputs, layer.weight, layer.bias)
    return _Linear.apply(rows_TK, layer.weight, layer.bias).view(*inputs.shape[:-1], -1)
