"""AdamW on sharded parameters, and its learning rate, a function of the step alone."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from agentloop.config import OptimConfig
from agentloop.errors import WorkerError


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then `lr` to `lr_end`.

    A pure function: a resumed run needs no scheduler state beyond the step.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps

    end = config.lr if config.lr_end is None else config.lr_end
    if config.schedule == "constant":
        return config.lr

    span = max(total_steps - config.warmup_steps - 1, 1)
    done = min((step - config.warmup_steps) / span, 1.0)
    if config.schedule == "linear":
        return config.lr + (end - config.lr) * done
    return end + (config.lr - end) * 0.5 * (1.0 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW; as usual, vectors (norms, biases) have no weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2]},
        {"params": [parameter for parameter in trained if parameter.ndim < 2]},
    ]
    return apply_settings(torch.optim.AdamW(groups, fused=True), config)


def apply_settings(optimizer: torch.optim.AdamW, config: OptimConfig) -> torch.optim.AdamW:
    """Set betas, eps and weight decay from `config`; the learning rate is set at each step."""
    for group, decay in zip(optimizer.param_groups, (config.weight_decay, 0.0), strict=True):
        group.update(betas=tuple(config.betas), eps=config.eps, weight_decay=decay)
    return optimizer


def move_optimizer(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Move an optimizer's moments and step counts."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                state[name] = value.to(device)


def set_zero_gradients(optimizer: torch.optim.AdamW, *, first: bool) -> None:
    """Give parameters the gradient 0, where no backward pass gave them one.

    AdamW skips a parameter without a gradient; with 0 its moments decay, and it moves on by them.

    Args:
        first: no step was taken yet; otherwise only parameters that have moments get one.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None and (first or parameter in optimizer.state):
                parameter.grad = torch.zeros_like(parameter)


def take_step(
    model: nn.Module, optimizer: torch.optim.AdamW, config: OptimConfig, *, normalizer: float, done: int, total: int
) -> dict[str, float]:
    """Divide the gradient by `normalizer`, clip it, take one AdamW step and reset the gradient.

    Args:
        done: optimizer steps taken before.
        total: optimizer steps of the whole schedule.

    Returns:
        `lr`, and `grad_norm` before clipping.

    Raises:
        WorkerError: the gradient is not finite; the step is not taken.
    """
    norm = scale_and_clip(model, normalizer, config.grad_clip)
    if not math.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise WorkerError(
            f"the gradient of optimizer step {done + 1} is not finite (norm {norm})",
            "lower trainer.optim.lr, and look for trajectories with extreme logprobs in the trace of this step",
        )

    rate = learning_rate(config, done, total)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"lr": rate, "grad_norm": norm}


def scale_and_clip(model: nn.Module, normalizer: float, max_norm: float) -> float:
    """Divide gradients by `normalizer`, clip their global norm; return the norm before clipping."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if not parameters:
        return 0.0

    torch._foreach_div_([_local(parameter.grad) for parameter in parameters], normalizer)
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _local(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
