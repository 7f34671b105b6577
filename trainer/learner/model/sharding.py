"""Apply FSDP2 and activation checkpointing to a model's blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from agentloop.config import FsdpConfig
from trainer.learner.model.policy import PolicyModel, is_vision


def shard(
    model: PolicyModel, dtype: str, config: FsdpConfig, device: torch.device, *, reference: bool = False
) -> PolicyModel:
    """Shard in place, block by block, then the root. Gradients are summed over ranks, not averaged.

    With `bfloat16`, compute is bf16; master weights, optimizer and reduction stay float32.

    Args:
        reference: shard as the frozen reference: no activations to save, and its own offload
            setting.
    """
    precision = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offload: OffloadPolicy = OffloadPolicy()
    if config.offloads(reference=reference, device=device.type):
        offload = CPUOffloadPolicy()

    # The default would be a mesh of CUDA devices on any machine that has them.
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision, "offload_policy": offload}

    # Checkpointing before sharding: FSDP's hooks belong around the block, not inside what runs
    # again.
    blocks = decoder_blocks(model.lm)
    if config.activation_checkpointing and not reference:
        checkpoint_activations(blocks)
    for block in blocks:
        fully_shard(block, reshard_after_forward=config.reshard_after_forward, **options)
    fully_shard(model, reshard_after_forward=False, **options)

    if dist.get_world_size() > 1:  # one rank's sum is its mean; dividing by 1 would cost another pass and a copy
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    return model


def reshard(model: PolicyModel) -> PolicyModel:
    """Free gathered parameters, and return the model.

    A pass without gradient leaves the root's parameters gathered. Until a backward pass these are
    not the parameters that have gradients and that an optimizer changes.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model


def move_model(model: PolicyModel, device: torch.device) -> None:
    """Move a sharded model's parameters and buffers. They stay the same objects, for an optimizer.

    A model on another device than that of its mesh can be moved back, and nothing else.
    """
    reshard(model).to(device)


def reduce_gradients(model: PolicyModel, *, now: bool) -> None:
    """Set whether the next backward pass sums gradients over ranks or only adds them locally."""
    assert isinstance(model, FSDPModule), "shard() comes first"
    model.set_requires_gradient_sync(now)


class _Checkpointed(nn.Module):
    """Mixed into a block's class: keeps only its input, and runs `forward` again in backward.

    Only `forward` runs again, not `__call__`: FSDP's hooks, which gather the block's parameters,
    run once.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def checkpoint_activations(blocks: list[nn.Module]) -> None:
    """Compute each block again in the backward pass instead of keeping its activations.

    The block gets a subclass of its own class, as in torch's `fully_shard`: a wrapper module would
    change the names of its parameters, which files and checkpoints use.
    """
    for block in blocks:
        kind = type(block)
        block.__class__ = type(f"Checkpointed{kind.__name__}", (_Checkpointed, kind), {})


def decoder_blocks(lm: nn.Module) -> list[nn.Module]:
    """The blocks of an unsharded model (`_no_split_modules`), a vision tower's included."""
    names = set(getattr(lm, "_no_split_modules", None) or [])
    return [module for module in lm.modules() if type(module).__name__ in names]


def language_blocks(lm: PreTrainedModel) -> list[nn.Module]:
    """`decoder_blocks` without those of a vision tower."""
    tower = set(lm.base_model.visual.modules()) if is_vision(lm) else set()
    return [block for block in decoder_blocks(lm) if block not in tower]
