"""Logprob and entropy of the trained tokens, in chunks: a batch's logits never exist at once.

The backward pass recomputes each chunk's logits instead of keeping them: memory does not grow with
vocabulary x tokens.

Shapes: N trained tokens, C tokens of a chunk, E hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.learner.model.matmul import Matmul


def selected_logprobs(
    hidden_NE: Tensor, weight_VE: Tensor, targets_N: Tensor, temperature: float, chunk: int, matmul: Matmul
) -> tuple[Tensor, Tensor]:
    """Return `log softmax(hidden weight^T / temperature)` at the targets, and the entropy.

    Args:
        chunk: tokens whose logits exist at one time.
        matmul: how hidden states and weights are multiplied.

    Returns:
        logprobs (N) and entropy (N), float32, both differentiable in `hidden_NE` and `weight_VE`.
    """
    # The ignored error: torch does not annotate Function.apply.
    found: tuple[Tensor, Tensor] = _SelectedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_NE, weight_VE, targets_N, temperature, chunk, matmul
    )
    return found


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: Tensor,
        weight_VE: Tensor,
        targets_N: Tensor,
        temperature: float,
        chunk: int,
        matmul: Matmul,
    ) -> tuple[Tensor, Tensor]:
        logprobs_N = hidden_NE.new_empty(len(hidden_NE), dtype=torch.float32)
        entropy_N = torch.empty_like(logprobs_N)

        for begin in range(0, len(hidden_NE), chunk):
            rows = slice(begin, begin + chunk)
            all_CV = _log_softmax(hidden_NE[rows], weight_VE, temperature, matmul)
            logprobs_N[rows] = all_CV.gather(1, targets_N[rows, None]).squeeze(1)
            entropy_N[rows] = all_CV.exp().mul_(all_CV).sum(1).neg_()

        ctx.save_for_backward(hidden_NE, weight_VE, targets_N, entropy_N)
        ctx.temperature, ctx.chunk, ctx.matmul = temperature, chunk, matmul
        ctx.set_materialize_grads(False)  # the entropy's gradient is None where the loss has no entropy term
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """p: softmax, H: entropy.

        d logprob / d logit_j = [j = target] - p_j        d H / d logit_j = -p_j (log p_j + H)
        """
        grad_logprobs_N, grad_entropy_N = grads
        hidden_NE, weight_VE, targets_N, entropy_N = ctx.saved_tensors
        grad_hidden_NE = torch.empty_like(hidden_NE)
        grad_weight_VE = torch.zeros_like(weight_VE, dtype=torch.float32)
        matmul: Matmul = ctx.matmul

        for begin in range(0, len(hidden_NE), ctx.chunk):
            rows = slice(begin, begin + ctx.chunk)
            all_CV = _log_softmax(hidden_NE[rows], weight_VE, ctx.temperature, matmul)
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
            matmul.linear(grad_CV, weight_VE.T, out=grad_hidden_NE[rows])
            matmul.add_weight_gradient(grad_weight_VE, grad_CV, hidden_NE[rows])

        return grad_hidden_NE, grad_weight_VE.to(weight_VE.dtype), None, None, None, None


def _log_softmax(hidden_CE: Tensor, weight_VE: Tensor, temperature: float, matmul: Matmul) -> Tensor:
    logits_CV = matmul.linear(hidden_CE, weight_VE).float()
    if temperature != 1.0:
        logits_CV.div_(temperature)
    return torch.log_softmax(logits_CV, dim=-1)
