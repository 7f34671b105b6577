"""The last matmul of a half-precision model, in full precision.

Logits rounded to bfloat16 are off by 0.03 at a value of 8, and so are the logprobs computed from
them; the trainer and SGLang (`--enable-fp32-lm-head`) would round elsewhere. See "fp32 LM head" in
MiniMax-M1, arXiv 2506.13585, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class FullPrecisionHead(torch.nn.Module):
    """A linear output layer whose logits are float32.

    It shares the parameters of the layer that it replaces, under the same names: weights are
    published by name, and tied weights stay tied.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias: torch.nn.Parameter | None
        # Not by assignment, which would not register a bias of None.
        self.register_parameter("bias", linear.bias)
        self._copy: torch.Tensor | None = None
        self._stale = True

    @classmethod
    def install(cls, model: Any) -> FullPrecisionHead | None:
        """Replace `model`'s output layer if it is linear and half precision; else return None."""
        linear = model.get_output_embeddings()
        if not isinstance(linear, torch.nn.Linear) or linear.weight.dtype == torch.float32:
            return None
        head = cls(linear)
        model.set_output_embeddings(head)
        return head

    def weights_changed(self) -> None:
        """Refresh the full-precision copy before its next use, in the memory it has."""
        self._stale = True

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] in float32 of `hidden` [..., E]."""
        weight, bias = self.weight, self.bias
        if weight.device.type == "cuda":
            flat = hidden.reshape(-1, hidden.shape[-1])
            out = torch.mm(flat, weight.T, out_dtype=torch.float32).view(*hidden.shape[:-1], -1)
            return out if bias is None else out + bias.float()

        # The CPU has no matmul of half-precision inputs with a float32 result.
        if self._copy is None:
            self._copy = weight.float()
        elif self._stale:
            self._copy.copy_(weight)
        self._stale = False
        return F.linear(hidden.float(), self._copy, None if bias is None else bias.float())
