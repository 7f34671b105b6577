"""The last product of a half-precision model, in full precision.

Logits rounded to bfloat16 are 0.03 off at a value of 8, and so are the logprobs made of them; the trainer and SGLang
(`--enable-fp32-lm-head`) would round elsewhere. See "fp32 LM head" in MiniMax-M1, arXiv 2506.13585, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class FullPrecisionHead:
    """Replaces the forward of a model's output layer, if that is a plain linear one of half precision."""

    def __init__(self, model: Any) -> None:
        linear = model.get_output_embeddings()
        self._weight: torch.Tensor | None = None
        self._stale = True
        self._linear = linear
        if isinstance(linear, torch.nn.Linear) and linear.weight.dtype != torch.float32:
            # The module stays: its parameters' names are those that weights are published under.
            linear.forward = self._product  # type: ignore[method-assign,assignment]

    def weights_changed(self) -> None:
        """The copy in full precision is written anew when it is needed, into the memory that it has."""
        self._stale = True

    def _product(self, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = self._linear.weight, self._linear.bias
        if weight.device.type == "cuda":
            flat = hidden.reshape(-1, hidden.shape[-1])
            out = torch.mm(flat, weight.T, out_dtype=torch.float32).view(*hidden.shape[:-1], -1)
            return out if bias is None else out + bias.float()
        if self._weight is None:
            self._weight = weight.float()
        elif self._stale:
            self._weight.copy_(weight)
        self._stale = False
        return F.linear(hidden.float(), self._weight, None if bias is None else bias.float())
