"""The policy as the trainer runs it: a transformers causal LM over a packed row.

Shapes: T packed tokens, N trained tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from agentloop.errors import ModelError
from agentloop.model_folder import VISION_TYPES, load_pretrained
from agentloop.model_folder.pretrained import build_model, load_config, model_class
from trainer.learner.model.attention import ATTENTION, PackedRow
from trainer.learner.model.kernels import Kernels
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
        images = None if batch.images is None else batch.images().to(device)
        return cls(layout=batch.layout, columns=columns, images=images, **tensors)


class PolicyModel(nn.Module):
    """The language model with the logprob of given tokens as its output.

    The head is applied inside `forward` because FSDP2 gathers the root's parameters only there.

    Args:
        lm: a causal LM that was built with the attention `ATTENTION`.
        logprob_chunk: tokens whose logits exist at one time.
        kernels: the implementations that it uses.
    """

    lm: PreTrainedModel

    def __init__(self, lm: PreTrainedModel, logprob_chunk: int, kernels: Kernels) -> None:
        super().__init__()
        self.lm = lm
        self.logprob_chunk = logprob_chunk
        self.kernels = kernels

    def hidden(self, batch: DeviceBatch) -> Tensor:
        """The last hidden state of each packed token, (T, E)."""
        decoder = self.lm.base_model
        inputs: dict[str, Any] = {"input_ids": batch.tokens[None], "position_ids": batch.positions[None]}
        if batch.images is not None:
            decoder, inputs = decoder.language_model, insert_images(self.lm, batch.tokens, batch.images)

        row = PackedRow(batch.layout, self.kernels.attention)
        hidden_1TE: Tensor = decoder(use_cache=False, packed_row=row, **inputs).last_hidden_state
        return hidden_1TE[0]

    def forward(self, batch: DeviceBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Logprob and entropy of each trained token, (N) float32 each."""
        hidden_NE = self.hidden(batch)[batch.predict_from]
        head = self.lm.get_output_embeddings()
        return selected_logprobs(
            hidden_NE, head.weight, batch.targets, temperature, self.logprob_chunk, self.kernels.matmul
        )


def build_lm(path: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the language model of a folder on `meta`: shapes without values.

    Raises:
        ModelError: the path is not a causal LM, or one that the packed path does not compute.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        lm = build_model(config, path, trust_remote_code=trust_remote_code, **options_of(config))
    return _supported(lm, path)


def options_of(config: PretrainedConfig) -> dict[str, Any]:
    """Options with which a model of `config` is built or loaded."""
    # The vision tower attends over whole images: it keeps torch's own attention.
    attention = {"": "sdpa", "text_config": ATTENTION} if config.model_type in VISION_TYPES else ATTENTION
    return {"dtype": torch.float32, "attn_implementation": attention}


def is_vision(lm: PreTrainedModel) -> bool:
    """Whether a model takes images."""
    return lm.config.model_type in VISION_TYPES


def load_policy(
    path: str,
    *,
    init: Literal["weights", "random"],
    seed: int,
    logprob_chunk: int,
    device: torch.device,
    kernels: Kernels,
    trust_remote_code: bool = False,
) -> PolicyModel:
    """Read a whole causal LM in float32, not sharded.

    The ranks use `trainer.learner.model.loading`, which falls back to this.

    Args:
        path: folder of a Hugging Face model, or a hub id.
        init: `random` draws the weights with `seed` and needs `config.json` only.
        trust_remote_code: `model.trust_remote_code`.

    The caller has checked that the files hold all tensors (`agentloop.model_folder.tensors`).

    Raises:
        ModelError: the path is not a causal LM, or one that the packed path does not compute.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    options = options_of(config)
    if init == "random":
        torch.manual_seed(seed)
        lm = build_model(config, path, trust_remote_code=trust_remote_code, **options)
    else:
        options |= {"config": config, "use_safetensors": True}
        loader = model_class(config)
        lm = load_pretrained(loader, path, "its weights", trust_remote_code=trust_remote_code, **options)

    # Always in eval mode: the engine samples without dropout, so it must not be used in training.
    return PolicyModel(_supported(lm, path), logprob_chunk, kernels).to(device).eval()


def _supported(lm: PreTrainedModel, path: str) -> PreTrainedModel:
    """Return `lm`, if the packed path computes all of its features.

    Raises:
        ModelError: it does not compute one of them.
    """
    config = lm.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ModelError(f"{path}: the trainer does not compute {name} of {config.model_type}", "use another model")

    if getattr(lm.get_output_embeddings(), "bias", None) is not None:
        raise ModelError(f"{path}: the output head has a bias, which the trainer does not compute", "use another model")
    return lm
