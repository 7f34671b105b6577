"""Images in the trainer: from a trajectory's files to rows of hidden states, at M-RoPE positions.

As in the torch engine, the vision tower's rows replace an image's pad tokens (Qwen2-VL, arXiv
2409.12191, section 2.1); Qwen3-VL adds further rows after each of the first layers (DeepStack,
arXiv 2406.04334). The images of a shared prompt go through the tower once.

Shapes: T packed tokens, L tokens of a sample, I images, N patches, C values of a patch, R rows
(pads), E hidden size.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from agentloop.errors import DataError
from agentloop.images import open_image
from agentloop.model_folder import load_image_processor
from trainer.packing.units import Unit
from trainer.types import Sample

CACHE_BYTES = 2**28
"""Size of the patch cache: an image returns in every epoch and micro-batch of its group."""


@dataclass(frozen=True, slots=True)
class PackedImages:
    """The inputs of a vision-language model in a micro-batch, beside its tokens.

    Attributes:
        positions_3T: rotary positions in time, height and width.
        patches_NC: normalized patches of the images, in the order of their pads; None: no images.
        grids_I3: patches of each image in time, height and width; None: no images.
    """

    positions_3T: Tensor
    patches_NC: Tensor | None
    grids_I3: Tensor | None

    def to(self, device: torch.device) -> PackedImages:
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        positions_3T = self.positions_3T.to(device, non_blocking=True)
        return PackedImages(positions_3T, moved(self.patches_NC), moved(self.grids_I3))


class ImageReader:
    """Turns a sample's images into patches, and computes its positions.

    Args:
        lm: the vision-language model, which defines the positions; sharded or not.
        path: its folder, with the image processor's configuration.
        trust_remote_code: `model.trust_remote_code`.

    Raises:
        ModelError: the image processor cannot be loaded.
    """

    def __init__(self, lm: PreTrainedModel, path: str, *, trust_remote_code: bool = False) -> None:
        self._processor = load_image_processor(path, trust_remote_code=trust_remote_code)
        self._body = lm.base_model
        self._pad = int(lm.config.image_token_id)
        self._merged = int(self._processor.merge_size) ** 2
        self._cache: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()  # the least recently used one first
        self._bytes = 0

    def attach(self, samples: Sequence[Sample], units: Sequence[Unit]) -> PackedImages:
        """Return images and positions of the row that `pack` makes of these units.

        Raises:
            DataError: a sample's images do not match its pad tokens.
        """
        positions: list[Tensor] = []
        images: list[tuple[Tensor, Tensor]] = []
        for unit in units:
            prompt = unit.prompt_length
            for number, (index, length) in enumerate(zip(unit.samples, unit.lengths, strict=True)):
                seen, positions_3L = self._see(samples[index])
                begin = 0 if number == 0 else prompt  # the first sample brings the shared prompt
                positions.append(positions_3L[:, begin : max(length, prompt)])
                images += [image for start, image in seen if begin <= start < max(length, prompt)]

        return PackedImages(
            torch.cat(positions, dim=1),
            torch.cat([patches for patches, _ in images]) if images else None,
            torch.cat([grid for _, grid in images]) if images else None,
        )

    def blank(self, tokens: int) -> PackedImages:
        """Return the inputs of a row of `tokens` tokens without images."""
        return PackedImages(torch.arange(tokens).expand(3, -1), None, None)

    def _see(self, sample: Sample) -> tuple[list[tuple[int, tuple[Tensor, Tensor]]], Tensor]:
        """Return the images, each with the index of its first pad, and the positions (3, L)."""
        pads = np.concatenate([[0], sample.token_ids == self._pad, [0]])
        places = np.flatnonzero(np.diff(pads)).reshape(-1, 2).tolist()
        if len(places) != len(sample.images):
            raise DataError(
                f"a trajectory holds {len(sample.images)} images but {len(places)} runs of image pad tokens",
                "its agent changed messages with images: keep each image where its placeholder was rendered",
            )
        if not places:
            return [], torch.arange(len(sample)).expand(3, -1)

        images = [self._patches(data) for data in sample.images]
        for (start, end), (_, grid) in zip(places, images, strict=True):
            if int(grid.prod()) // self._merged != end - start:
                raise DataError(
                    f"an image of a trajectory takes {int(grid.prod()) // self._merged} tokens, but the trajectory "
                    f"holds {end - start} pad tokens for it at token {start}",
                    "give the rollout server and the trainer the same preprocessor_config.json",
                )

        ids = torch.from_numpy(sample.token_ids).long()[None]  # positions take the dtype of the ids
        positions_3L, _ = self._body.get_rope_index(
            ids, mm_token_type_ids=(ids == self._pad).int(), image_grid_thw=torch.cat([grid for _, grid in images])
        )
        return [(start, image) for (start, _), image in zip(places, images, strict=True)], positions_3L[:, 0]

    def _patches(self, data: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the patches (N, C) and the grid (1, 3) of an image file."""
        file = data.tobytes()
        key = hashlib.sha256(file).digest()
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]

        made = self._processor(images=[open_image(file).convert("RGB")], return_tensors="pt")
        item = self._cache[key] = made["pixel_values"], made["image_grid_thw"]
        self._bytes += item[0].nbytes
        while self._bytes > CACHE_BYTES and len(self._cache) > 1:
            self._bytes -= self._cache.popitem(last=False)[1][0].nbytes
        return item


def insert_images(lm: PreTrainedModel, tokens_T: Tensor, images: PackedImages) -> dict[str, Any]:
    """Return the decoder's inputs in place of token ids.

    These are embeddings with the images' rows, positions, and the rows to add after the first
    layers. With several ranks the tower runs in every micro-batch, over one blank patch if there is
    no image: its parameters are gathered by collectives, in which all ranks must take part.
    """
    embeds_TE = lm.get_input_embeddings()(tokens_T)
    options: dict[str, Any] = {"position_ids": images.positions_3T[:, None]}

    if images.patches_NC is not None and images.grids_I3 is not None:
        rows_RE, added = _tower_rows(lm, images.patches_NC, images.grids_I3)
        pads_T = tokens_T == lm.config.image_token_id
        embeds_TE = embeds_TE.masked_scatter(pads_T.unsqueeze(-1), rows_RE.to(embeds_TE.dtype))
        if added:
            options |= {"visual_pos_masks": pads_T[None], "deepstack_visual_embeds": added}

    elif dist.is_initialized() and dist.get_world_size() > 1:
        tower = lm.base_model.visual
        side = int(tower.config.spatial_merge_size)
        width = int(tower.config.in_channels * tower.config.temporal_patch_size * tower.config.patch_size**2)
        rows_RE, added = _tower_rows(
            lm, embeds_TE.new_zeros(side * side, width), torch.tensor([[1, side, side]], device=tokens_T.device)
        )
        # Adds zero, so that every parameter of the tower has a gradient on this rank as on the
        # others.
        blank: Any = sum(part.sum() for part in (rows_RE, *added))
        embeds_TE = embeds_TE + blank.to(embeds_TE.dtype) * 0

    return options | {"inputs_embeds": embeds_TE[None]}


def _tower_rows(lm: PreTrainedModel, patches_NC: Tensor, grids_I3: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the tower's rows (R, E), and the rows to add after each of the first layers."""
    frozen = not any(parameter.requires_grad for parameter in lm.base_model.visual.parameters())
    with torch.no_grad() if frozen else contextlib.nullcontext():
        out = lm.base_model.get_image_features(patches_NC, grids_I3)
    return torch.cat(out.pooler_output), [torch.cat(part) for part in getattr(out, "deepstack_features", None) or ()]


def freeze_tower(lm: PreTrainedModel) -> None:
    """Exclude the vision tower and its merger from training."""
    lm.base_model.visual.requires_grad_(False)
