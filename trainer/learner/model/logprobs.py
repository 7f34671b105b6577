"""Logprob and entropy of the trained tokens, in chunks: the logits of a whole batch never exist.

The backward pass computes a chunk's logits again instead of keeping them; memory is flat in vocabulary x tokens.

Shapes: N trained tokens, C tokens of a chunk, E hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.learner.model.matmul import add_product, product


def selected_logprobs(
    hidden_NE: Tensor, weight_VE: Tensor, targets_N: Tensor, temperature: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """`log softmax(hidden weight^T / temperature)` at the targets, and the entropy of that distribution.

    Returns:
        logprobs (N) and entropy (N), float32, both differentiable in `hidden_NE` and `weight_VE`.
    """
    return _SelectedLogprobs.apply(hidden_NE, weight_VE, targets_N, temperature, chunk)


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NE: Tensor, weight_VE: Tensor, targets_N: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        logprobs_N = hidden_NE.new_empty(len(hidden_NE), dtype=torch.float32)
        entropy_N = torch.empty_like(logprobs_N)
        for begin in range(0, len(hidden_NE), chunk):
            rows = slice(begin, begin + chunk)
            all_CV = _log_softmax(hidden_NE[rows], weight_VE, temperature)
            logprobs_N[rows] = all_CV.gather(1, targets_N[rows, None]).squeeze(1)
            entropy_N[rows] = all_CV.exp().mul_(all_CV).sum(1).neg_()
        ctx.save_for_backward(hidden_NE, weight_VE, targets_N, entropy_N)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """p: softmax, H: entropy; d logprob / d logit_j = [j = target] - p_j; d H / d logit_j = -p_j (log p_j + H)."""
        grad_logprobs_N, grad_entropy_N = grads
        hidden_NE, weight_VE, targets_N, entropy_N = ctx.saved_tensors
        grad_hidden_NE = torch.empty_like(hidden_NE)
        grad_weight_VE = torch.zeros_like(weight_VE, dtype=torch.float32)
        for begin in range(0, len(hidden_NE), ctx.chunk):
            rows = slice(begin, begin + ctx.chunk)
            all_CV = _log_softmax(hidden_NE[rows], weight_VE, ctx.temperature)
            if grad_entropy_N is None:
                assert grad_logprobs_N is not None
                grad_CV = all_CV.exp_().mul_(-grad_logprobs_N[rows, None])
            else:
                slope_CV = all_CV + entropy_N[rows, None]
                slope_CV.mul_(grad_entropy_N[rows, None])
                if grad_logprobs_N is not None:
                    slope_CV.add_(grad_logprobs_N[rows, None])
                grad_CV = all_CV.exp_().mul_(slope_CV).neg_()
            if grad_logprobs_N is not None:
                grad_CV.scatter_add_(1, targets_N[rows, None], grad_logprobs_N[rows, None])
            grad_CV.div_(ctx.temperature)
            grad_CV = grad_CV.to(hidden_NE.dtype)
            product(grad_CV, weight_VE.T, out=grad_hidden_NE[rows])
            add_product(grad_weight_VE, grad_CV, hidden_NE[rows])
        return grad_hidden_NE, grad_weight_VE.to(weight_VE.dtype), None, None, None


def _log_softmax(hidden_CE: Tensor, weight_VE: Tensor, temperature: float) -> Tensor:
    logits_CV = product(hidden_CE, weight_VE).float()
    if temperature != 1.0:
        logits_CV.div_(temperature)
    return torch.log_softmax(logits_CV, dim=-1)
