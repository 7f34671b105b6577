"""The policy as the trainer runs it: a transformers causal LM over a packed row, sharded by FSDP2.

Shapes: T packed tokens, N trained tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from agentloop.errors import ModelError
from trainer.attention import ATTENTION
from trainer.logprobs import selected_logprobs
from trainer.packing import PackedBatch, PackedLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(slots=True)
class DeviceBatch:
    """A `PackedBatch` as tensors on the model's device; the same fields."""

    layout: PackedLayout
    tokens: Tensor
    positions: Tensor
    predict_from: Tensor
    targets: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    loss_weights: Tensor

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device) -> DeviceBatch:
        names = [field.name for field in fields(cls) if field.name != "layout"]
        tensors = {name: torch.from_numpy(getattr(batch, name)).to(device, non_blocking=True) for name in names}
        return cls(layout=batch.layout, **tensors)


class PolicyModel(nn.Module):
    """The language model with the logprob of given tokens as its output.

    The head is applied inside `forward` because FSDP2 gathers the root's parameters only there.
    """

    def __init__(self, lm: nn.Module, logprob_chunk: int) -> None:
        super().__init__()
        self.lm = lm
        self.logprob_chunk = logprob_chunk

    def hidden(self, batch: DeviceBatch) -> Tensor:
        """The last hidden state of each packed token, (T, E)."""
        return self.lm.base_model(
            input_ids=batch.tokens.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            packed_layout=batch.layout,
        ).last_hidden_state[0]

    def forward(self, batch: DeviceBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Logprob and entropy of each trained token, (N) float32 each."""
        hidden_TE = self.hidden(batch)
        head = self.lm.get_output_embeddings()
        return selected_logprobs(
            hidden_TE[batch.predict_from], head.weight, batch.targets, temperature, self.logprob_chunk
        )


def load_policy(
    path: str, *, init: Literal["weights", "random"], seed: int, logprob_chunk: int, device: torch.device
) -> PolicyModel:
    """Read a causal LM in float32 (the master weights), ready to be sharded.

    Args:
        path: folder of a Hugging Face model, or a hub id.
        init: `random` draws the weights with `seed` and needs `config.json` only.

    Raises:
        ModelError: the path is no causal LM, or one that the packed path does not compute.
    """
    options = {"dtype": torch.float32, "attn_implementation": ATTENTION}
    try:
        if init == "random":
            torch.manual_seed(seed)
            lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), **options)
        else:
            lm = AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as exc:
        raise ModelError(
            f"{path} cannot be loaded as a causal language model: {exc}",
            "model.path has to be a folder with config.json and safetensors, or a hub id",
        ) from exc
    config = lm.config
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ModelError(f"{path}: the trainer does not compute {name} of {config.model_type}", "use another model")
    if getattr(lm.get_output_embeddings(), "bias", None) is not None:
        raise ModelError(f"{path}: the output head has a bias, which the trainer does not compute", "use another model")
    # Always in eval mode: the engine samples without dropout, and the policy that is trained is the one that sampled.
    return PolicyModel(lm, logprob_chunk).to(device).eval()


def shard(model: PolicyModel, dtype: str, *, reshard_after_forward: bool) -> PolicyModel:
    """Shard in place: every decoder block, then the rest as the root. Gradients are summed over ranks, not averaged.

    With `bfloat16`, compute is bf16 and master weights, optimizer and reduction stay float32.
    """
    precision = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in decoder_blocks(model):
        fully_shard(block, mp_policy=precision, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mp_policy=precision, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def decoder_blocks(model: PolicyModel) -> list[nn.Module]:
    """The repeated blocks of the language model, as transformers names them in `_no_split_modules`."""
    names = set(getattr(model.lm, "_no_split_modules", None) or [])
    return [module for module in model.lm.modules() if type(module).__name__ in names]
