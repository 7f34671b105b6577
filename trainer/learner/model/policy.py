"""The policy as the trainer runs it: a transformers causal LM over a packed row, sharded by FSDP2.

Shapes: T packed tokens, N trained tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from agentloop.config import FsdpConfig
from agentloop.errors import ModelError
from agentloop.model_folder import VISION_TYPES
from trainer.learner.model.attention import ATTENTION
from trainer.learner.model.logprobs import selected_logprobs
from trainer.learner.model.vision import PackedImages, insert_images
from trainer.packing.layout import PackedBatch, PackedLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(slots=True)
class DeviceBatch:
    """A `PackedBatch` as tensors on the model's device; the same fields."""

    layout: PackedLayout
    tokens: Tensor
    positions: Tensor
    predict_from: Tensor
    targets: Tensor
    columns: dict[str, Tensor]
    loss_weights: Tensor
    images: PackedImages | None = None

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device) -> DeviceBatch:
        names = [field.name for field in fields(cls) if field.name not in ("layout", "columns", "images")]
        tensors = {name: torch.from_numpy(getattr(batch, name)).to(device, non_blocking=True) for name in names}
        columns = {name: torch.from_numpy(c).to(device, non_blocking=True) for name, c in batch.columns.items()}
        images = None if batch.images is None else batch.images.to(device)
        return cls(layout=batch.layout, columns=columns, images=images, **tensors)


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
        decoder, inputs = self.lm.base_model, {"input_ids": batch.tokens[None], "position_ids": batch.positions[None]}
        if batch.images is not None:
            decoder, inputs = decoder.language_model, insert_images(self.lm, batch.tokens, batch.images)
        return decoder(use_cache=False, packed_layout=batch.layout, **inputs).last_hidden_state[0]

    def forward(self, batch: DeviceBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Logprob and entropy of each trained token, (N) float32 each."""
        hidden_TE = self.hidden(batch)
        head = self.lm.get_output_embeddings()
        return selected_logprobs(
            hidden_TE[batch.predict_from], head.weight, batch.targets, temperature, self.logprob_chunk
        )


def model_config(path: str) -> Any:
    """The config of a model folder.

    Raises:
        ModelError: there is none, or transformers does not know it.
    """
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as exc:
        raise _not_a_model(path, exc) from exc


def build_lm(path: str) -> Any:
    """The language model of a folder on `meta`: its shapes, without values.

    Raises:
        ModelError: the path is no causal LM, or one that the packed path does not compute.
    """
    config = model_config(path)
    loader, options = loader_of(config)
    try:
        with torch.device("meta"):
            lm = loader.from_config(config, **options)
    except (OSError, ValueError, KeyError) as exc:
        raise _not_a_model(path, exc) from exc
    return _supported(lm, path)


def loader_of(config: Any) -> tuple[Any, dict[str, Any]]:
    """The class that makes a model of `config`, and its options."""
    if config.model_type in VISION_TYPES:
        # The vision tower looks at whole images: it keeps torch's own attention.
        return AutoModelForImageTextToText, {
            "dtype": torch.float32,
            "attn_implementation": {"": "sdpa", "text_config": ATTENTION},
        }
    return AutoModelForCausalLM, {"dtype": torch.float32, "attn_implementation": ATTENTION}


def is_vision(lm: Any) -> bool:
    """Whether a model takes images."""
    return lm.config.model_type in VISION_TYPES


def load_policy(
    path: str, *, init: Literal["weights", "random"], seed: int, logprob_chunk: int, device: torch.device
) -> PolicyModel:
    """Read a whole causal LM in float32, not sharded.

    The ranks use `trainer.learner.model.loading`, which falls back to this.

    Args:
        path: folder of a Hugging Face model, or a hub id.
        init: `random` draws the weights with `seed` and needs `config.json` only.

    Raises:
        ModelError: the path is no causal LM, or one that the packed path does not compute.
    """
    config = model_config(path)
    loader, options = loader_of(config)
    try:
        if init == "random":
            torch.manual_seed(seed)
            lm = loader.from_config(config, **options)
        else:
            lm = loader.from_pretrained(path, config=config, **options)
    except (OSError, ValueError, KeyError) as exc:
        raise _not_a_model(path, exc) from exc
    # Always in eval mode: the engine samples without dropout, and the policy that is trained is the one that sampled.
    return PolicyModel(_supported(lm, path), logprob_chunk).to(device).eval()


def _not_a_model(path: str, exc: Exception) -> ModelError:
    return ModelError(
        f"{path} cannot be loaded as a causal language model: {exc}",
        "model.path has to be a folder with config.json and safetensors, or a hub id",
    )


def _supported(lm: Any, path: str) -> Any:
    """`lm`, after a look whether the trainer computes what it does.

    Raises:
        ModelError: it does not.
    """
    config = lm.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ModelError(f"{path}: the trainer does not compute {name} of {config.model_type}", "use another model")
    if getattr(lm.get_output_embeddings(), "bias", None) is not None:
        raise ModelError(f"{path}: the output head has a bias, which the trainer does not compute", "use another model")
    return lm


def shard(
    model: PolicyModel, dtype: str, config: FsdpConfig, device: torch.device, *, reference: bool = False
) -> PolicyModel:
    """Shard in place: every decoder block, then the rest as the root. Gradients are summed over ranks, not averaged.

    With `bfloat16`, compute is bf16 and master weights, optimizer and reduction stay float32.

    Args:
        reference: the frozen reference: no activations to save, and an offload of its own.
    """
    precision = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offload: OffloadPolicy = OffloadPolicy()
    if config.offloads(reference=reference, device=device.type):
        offload = CPUOffloadPolicy()
    if config.activation_checkpointing and not reference:
        checkpoint_activations(model)
    # The default would be a mesh of CUDA devices wherever there is one.
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision, "offload_policy": offload}
    for block in decoder_blocks(model.lm):
        fully_shard(block, reshard_after_forward=config.reshard_after_forward, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    if dist.get_world_size() > 1:  # one rank's sum is its mean, and a division by 1 would be another pass and a copy
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    return model


def reshard(model: PolicyModel) -> PolicyModel:
    """Let go of gathered parameters, and return the model.

    A pass without gradient leaves the root's gathered: until a backward pass, its parameters are not those that have
    gradients and that an optimizer changes.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model


def checkpoint_activations(model: PolicyModel) -> None:
    """Keep only each block's input for the backward pass, which computes the block again.

    It is `forward` that runs again, not the call: FSDP's hooks, which gather the block's parameters, run once.
    """
    for block in decoder_blocks(model.lm):
        block.forward = functools.partial(  # type: ignore[method-assign]
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def decoder_blocks(lm: nn.Module) -> list[nn.Module]:
    """The repeated blocks of the model, a vision tower's too, as transformers names them in `_no_split_modules`."""
    names = set(getattr(lm, "_no_split_modules", None) or [])
    return [module for module in lm.modules() if type(module).__name__ in names]


def language_blocks(lm: Any) -> list[nn.Module]:
    """`decoder_blocks` without those of a vision tower."""
    tower = set(lm.base_model.visual.modules()) if is_vision(lm) else set()
    return [block for block in decoder_blocks(lm) if block not in tower]
