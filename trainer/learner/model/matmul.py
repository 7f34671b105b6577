"""Float32 matmul of a rank on a CPU: torch's own, or oneDNN where that is faster.

torch multiplies float32 matrices with MKL, which uses AVX-512 on Intel processors only. oneDNN
ships with torch and uses AVX-512 wherever the processor has it.

oneDNN compiles and caches code for each shape, more than half a megabyte each, and no two
micro-batches have the same number of tokens. It therefore gets blocks of ROWS rows, one shape for
each weight, and MKL gets the remaining rows.

Shapes: T rows, K inputs, N outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from agentloop.errors import ConfigError

ROWS = 256
"""Rows of a block that oneDNN multiplies."""

_NONE: tuple[str, list[float], str] = ("none", [], "")
"""No activation, its arguments, its algorithm."""


class Matmul:
    """torch's own matmul. The subclass `OneDnnMatmul` overrides it for float32 on a CPU."""

    def linear(self, rows_TK: Tensor, weight_NK: Tensor, out: Tensor | None = None) -> Tensor:
        """Return `rows weight^T` (T, N), written to `out` if given. Not differentiable."""
        return torch.mm(rows_TK, weight_NK.T, out=out)

    def add_weight_gradient(self, into_NK: Tensor, grad_TN: Tensor, rows_TK: Tensor) -> Tensor:
        """Add `grad^T rows`, the contribution of T tokens to a weight's gradient, to `into`."""
        into_NK += grad_TN.T @ rows_TK
        return into_NK

    def install(self, model: nn.Module) -> None:
        """Let the linear layers inside `model` use this matmul; torch's own needs no change."""


class OneDnnMatmul(Matmul):
    """oneDNN in blocks of `rows` rows for float32 on a CPU, torch for everything else."""

    def __init__(self, rows: int = ROWS) -> None:
        self.rows = rows

    def linear(self, rows_TK: Tensor, weight_NK: Tensor, out: Tensor | None = None) -> Tensor:
        if not self.suits(rows_TK, weight_NK):
            return super().linear(rows_TK, weight_NK, out)

        if out is None:
            out = rows_TK.new_empty(len(rows_TK), len(weight_NK))
        whole = len(rows_TK) // self.rows * self.rows
        for begin in range(0, whole, self.rows):
            block = slice(begin, begin + self.rows)
            out[block] = torch.ops.mkldnn._linear_pointwise(rows_TK[block], weight_NK, None, *_NONE)

        if whole < len(rows_TK):
            torch.mm(rows_TK[whole:], weight_NK.T, out=out[whole:])
        return out

    def add_weight_gradient(self, into_NK: Tensor, grad_TN: Tensor, rows_TK: Tensor) -> Tensor:
        if not self.suits(grad_TN, rows_TK):
            return super().add_weight_gradient(into_NK, grad_TN, rows_TK)

        whole = len(grad_TN) // self.rows * self.rows
        for begin in range(0, whole, self.rows):
            block = slice(begin, begin + self.rows)
            into_NK += torch.ops.mkldnn._linear_pointwise(grad_TN[block].T, rows_TK[block].T, None, *_NONE)

        if whole < len(grad_TN):
            into_NK += grad_TN[whole:].T @ rows_TK[whole:]
        return into_NK

    def suits(self, a: Tensor, b: Tensor) -> bool:
        """Whether oneDNN multiplies these two: both float32, on a CPU."""
        return a.device.type == "cpu" and a.dtype == b.dtype == torch.float32

    def install(self, model: nn.Module) -> None:
        made: dict[nn.Module, OneDnnLinear] = {}  # a layer that is used twice stays one layer
        for name, layer in list(model.named_modules(remove_duplicate=False)):
            if type(layer) is nn.Linear:
                if layer not in made:
                    made[layer] = OneDnnLinear(layer, self)
                model.set_submodule(name, made[layer])


def make_matmul(choice: Literal["auto", "torch", "onednn"]) -> Matmul:
    """Return the matmul of that name; `auto` is oneDNN where MKL would leave AVX-512 unused.

    Raises:
        ConfigError: this build of torch has no oneDNN.
    """
    if choice == "onednn" and not torch.backends.mkldnn.is_available():
        raise ConfigError(
            "trainer.matmul=onednn, but this build of torch has no oneDNN", "set trainer.matmul to auto or torch"
        )
    if choice == "onednn" or (choice == "auto" and _mkl_is_slow()):
        return OneDnnMatmul(ROWS)
    return Matmul()


def _mkl_is_slow() -> bool:
    """Whether the processor has AVX-512 and is not Intel's."""
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


class OneDnnLinear(nn.Linear):
    """A linear layer that multiplies through oneDNN, with the parameters of the one it replaces.

    Still an `nn.Linear` with the same parameter names, which is what peft, FSDP2 and checkpoints go
    by.
    """

    def __init__(self, layer: nn.Linear, matmul: OneDnnMatmul) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.training = layer.training
        self.matmul = matmul

    def forward(self, input: Tensor) -> Tensor:
        rows_TK = input.reshape(-1, input.shape[-1])
        # Less than one block is not worth the overhead.
        if len(rows_TK) < self.matmul.rows or not self.matmul.suits(rows_TK, self.weight):
            return functional.linear(input, self.weight, self.bias)

        # The ignored error: torch does not annotate Function.apply.
        out_TN: Tensor = _Linear.apply(rows_TK, self.weight, self.bias, self.matmul)  # type: ignore[no-untyped-call]
        return out_TN.view(*input.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, matmul: Matmul) -> Tensor:
        ctx.save_for_backward(rows_TK, weight_NK)
        ctx.matmul = matmul
        out_TN = matmul.linear(rows_TK, weight_NK)
        return out_TN if bias_N is None else out_TN.add_(bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
        rows_TK, weight_NK = ctx.saved_tensors
        matmul: Matmul = ctx.matmul
        for_rows, for_weight, for_bias, _ = ctx.needs_input_grad
        grad_TN = grad_TN.contiguous()

        return (
            matmul.linear(grad_TN, weight_NK.T) if for_rows else None,
            matmul.add_weight_gradient(torch.zeros_like(weight_NK), grad_TN, rows_TK) if for_weight else None,
            grad_TN.sum(0) if for_bias else None,
            None,
        )
