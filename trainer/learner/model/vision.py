"""Images in the trainer: from the bytes that a trajectory holds to rows of hidden states, at M-RoPE positions.

As in the torch engine: the decoder sees, in the place of an image's pads, the rows that the vision tower makes of it
(Qwen2-VL, arXiv 2409.12191, section 2.1); Qwen3-VL adds further rows after each of the first layers (DeepStack,
arXiv 2406.04334). A shared prompt's images go through the tower once.

Shapes: T packed tokens, L tokens of a sample, I images, N patches, C values of a patch, R rows (pads), E hidden size.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from agentloop.chat.images import open_image
from agentloop.errors import DataError
from agentloop.model_folder import load_image_processor
from trainer.packing.units import Unit
from trainer.types import Sample

CACHE_BYTES = 2**28
"""Patches of images seen before: a row comes again in every epoch, and in every micro-batch its group is cut into."""


@dataclass(frozen=True, slots=True)
class PackedImages:
    """What a micro-batch of a vision-language model has beside its tokens.

    Attributes:
        positions_3T: rotary positions in time, height and width.
        patches_NC: normalized patches of the images, in the order of their pads; None: no images.
        grids_I3: patches of each in time, height and width; None: no images.
    """

    positions_3T: Tensor
    patches_NC: Tensor | None
    grids_I3: Tensor | None

    def to(self, device: torch.device) -> PackedImages:
        tensors = (self.positions_3T, self.patches_NC, self.grids_I3)
        return replace(
            self,
            **{
                name: None if tensor is None else tensor.to(device, non_blocking=True)
                for name, tensor in zip(("positions_3T", "patches_NC", "grids_I3"), tensors, strict=True)
            },
        )


class ImageReader:
    """Makes patches of a sample's images and finds its positions.

    Args:
        lm: the vision-language model, for its rule of positions; sharded or not.
        path: its folder, which holds the image processor's configuration.

    Raises:
        ModelError: the image processor cannot be loaded.
    """

    def __init__(self, lm: Any, path: str) -> None:
        self._processor = load_image_processor(path)
        self._body = lm.base_model
        self._pad = int(lm.config.image_token_id)
        self._merged = int(self._processor.merge_size) ** 2
        self._kept: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self._bytes = 0

    def attach(self, samples: Sequence[Sample], units: Sequence[Unit]) -> PackedImages:
        """Images and positions of the row that `trainer.packing.layout.pack` makes of these units.

        Raises:
            DataError: a sample's images do not fit its pads.
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
        """Of a row of `tokens` tokens that holds no image."""
        return PackedImages(torch.arange(tokens).expand(3, -1), None, None)

    def _see(self, sample: Sample) -> tuple[list[tuple[int, tuple[Tensor, Tensor]]], Tensor]:
        """The sample's images with where their pads begin, and its positions (3, L)."""
        pads = np.concatenate([[0], sample.token_ids == self._pad, [0]])
        places = np.flatnonzero(np.diff(pads)).reshape(-1, 2).tolist()
        if len(places) != len(sample.images):
            raise DataError(
                f"a trajectory holds {len(sample.images)} images and {len(places)} places for them",
                "its agent changed messages with images: keep each image where its placeholder was rendered",
            )
        if not places:
            return [], torch.arange(len(sample)).expand(3, -1)
        images = [self._patches(data) for data in sample.images]
        for (start, end), (_, grid) in zip(places, images, strict=True):
            if int(grid.prod()) // self._merged != end - start:
                raise DataError(
                    f"an image of a trajectory is {int(grid.prod()) // self._merged} tokens, and {end - start} stand "
                    f"for it at {start}",
                    "the rollout server and the trainer need the same preprocessor_config.json",
                )
        ids = torch.from_numpy(sample.token_ids)[None]
        positions_3L, _ = self._body.get_rope_index(
            ids, mm_token_type_ids=(ids == self._pad).int(), image_grid_thw=torch.cat([grid for _, grid in images])
        )
        return [(start, image) for (start, _), image in zip(places, images, strict=True)], positions_3L[:, 0]

    def _patches(self, data: np.ndarray) -> tuple[Tensor, Tensor]:
        key = hashlib.sha256(data).digest()
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = self._processor(images=[open_image(data.tobytes()).convert("RGB")], return_tensors="pt")
        item = self._kept[key] = made["pixel_values"], made["image_grid_thw"]
        self._bytes += item[0].nbytes
        while self._bytes > CACHE_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1][0].nbytes
        return item


def insert_images(lm: Any, tokens_T: Tensor, images: PackedImages) -> dict[str, Any]:
    """What the decoder takes instead of token ids: embeddings with the images' rows, positions, rows to add later.

    With several ranks the tower runs in every micro-batch, over one blank patch where there is no image: its parts are
    gathered by collectives, which have to match.
    """
    embeds_TE = lm.get_input_embeddings()(tokens_T)
    options: dict[str, Any] = {"position_ids": images.positions_3T[:, None]}
    if images.patches_NC is not None and images.grids_I3 is not None:
        rows_RE, added = _look(lm, images.patches_NC, images.grids_I3)
        pads_T = tokens_T == lm.config.image_token_id
        embeds_TE = embeds_TE.masked_scatter(pads_T.unsqueeze(-1), rows_RE.to(embeds_TE.dtype))
        if added:
            options |= {"visual_pos_masks": pads_T[None], "deepstack_visual_embeds": added}
    elif dist.is_initialized() and dist.get_world_size() > 1:
        tower = lm.base_model.visual
        side = int(tower.config.spatial_merge_size)
        width = int(tower.config.in_channels * tower.config.temporal_patch_size * tower.config.patch_size**2)
        rows_RE, added = _look(
            lm, embeds_TE.new_zeros(side * side, width), torch.tensor([[1, side, side]], device=tokens_T.device)
        )
        # Nothing is added, and every parameter of the tower has a gradient, on this rank as on the others.
        embeds_TE = embeds_TE + sum(part.sum() for part in (rows_RE, *added)).to(embeds_TE.dtype) * 0
    return options | {"inputs_embeds": embeds_TE[None]}


def _look(lm: Any, patches_NC: Tensor, grids_I3: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The tower's rows (R, E), and those to add after each of the first layers."""
    frozen = not any(parameter.requires_grad for parameter in lm.base_model.visual.parameters())
    with torch.no_grad() if frozen else contextlib.nullcontext():
        out = lm.base_model.get_image_features(patches_NC, grids_I3)
    return torch.cat(out.pooler_output), [torch.cat(part) for part in getattr(out, "deepstack_features", None) or ()]


def freeze_tower(lm: nn.Module) -> None:
    """Leave the vision tower, its merger included, as it is."""
    body: Any = lm.base_model
    body.visual.requires_grad_(False)
