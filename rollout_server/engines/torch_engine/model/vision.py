"""Vision-language models of the Qwen-VL families.

The vision tower turns an image into rows, which replace the embeddings of its pads, at rotary
positions of three axes (M-RoPE, Qwen2-VL, arXiv 2409.12191, section 2.1). Qwen3-VL adds further
rows of the tower to the hidden states after each of the first layers (DeepStack, arXiv 2406.04334).
A prompt may be prefilled in chunks that end anywhere: the tower always runs over whole images, and
its rows are cached for the next chunk.

Sizes: T tokens of a pass, E hidden size, I rows of an image.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from agentloop.errors import ModelError
from agentloop.model_folder import load_image_processor
from rollout_server.engines.torch_engine.model.attention import DecodePass, PrefillPass
from rollout_server.engines.torch_engine.model.attention_hook import AttentionHook
from rollout_server.engines.torch_engine.model.head import FullPrecisionHead
from rollout_server.engines.torch_engine.model.images import Patches, PromptImageReader
from rollout_server.lru import LruCache
from rollout_server.placeholders import Placeholders

FEATURE_CACHE_BYTES = 2**28
"""Cache of the tower's rows, under the present weights."""


def load_image_reader(
    model: Any, path: str, placeholders: Placeholders, *, trust_remote_code: bool = False
) -> PromptImageReader:
    """Return a reader of requests' images for `model`.

    Raises:
        ModelError: the model's image processor cannot be loaded.
    """
    processor = load_image_processor(path, trust_remote_code=trust_remote_code)
    body = model.base_model
    if "mm_token_type_ids" not in inspect.signature(body.get_rope_index).parameters:
        raise ModelError(f"the installed transformers is too old to serve {path}", "pip install --upgrade transformers")

    def rope_index(
        ids: Sequence[int], places: Sequence[tuple[int, int]], grids_I3: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        kinds = torch.zeros(1, len(ids), dtype=torch.int)
        for start, end in places:
            kinds[0, start:end] = 1
        positions, delta = body.get_rope_index(torch.tensor([ids]), mm_token_type_ids=kinds, image_grid_thw=grids_I3)
        return positions[:, 0], int(delta)

    return PromptImageReader(processor, placeholders, rope_index)


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """The tower's rows of an image: [I, E] in place of its pads, and [I, E] to add after each of
    the first layers."""

    rows_IE: torch.Tensor
    added_IE: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        return self.rows_IE.nbytes * (1 + len(self.added_IE))


class VisionRunner:
    """A `Runner` for vision-language models, through transformers' own code."""

    def __init__(self, model: Any, attention: AttentionHook, full_head: FullPrecisionHead | None) -> None:
        self._body = model.base_model
        self._decoder = self._body.language_model
        self._embed = model.get_input_embeddings()
        self._head = model.get_output_embeddings()
        self._attention = attention
        self._full_head = full_head
        self._features: LruCache[bytes, Features] = LruCache(FEATURE_CACHE_BYTES, lambda features: features.nbytes)

    def prefill(self, chunks: PrefillPass) -> None:
        embeds_TE = self._embed(chunks.tokens)
        positions_3T = chunks.positions.expand(3, -1)
        added: dict[str, Any] = {}
        if any(chunk.images for chunk in chunks.chunks):
            positions_3T = self._positions(chunks)
            added = self._insert(chunks, embeds_TE)

        with self._attention.attending(chunks):
            self._decoder(inputs_embeds=embeds_TE[None], position_ids=positions_3T[:, None], use_cache=False, **added)

    def decode(self, tokens: torch.Tensor, batch: DecodePass) -> torch.Tensor:
        positions = batch.positions if batch.offsets is None else batch.positions + batch.offsets
        with self._attention.attending(batch):
            out = self._decoder(
                input_ids=tokens[:, None], position_ids=positions[None, :, None].expand(3, -1, -1), use_cache=False
            )
        logits: torch.Tensor = self._head(out.last_hidden_state[:, -1])
        return logits

    def weights_changed(self) -> None:
        self._features.clear()
        if self._full_head is not None:
            self._full_head.weights_changed()

    def _positions(self, chunks: PrefillPass) -> torch.Tensor:
        """Rotary positions [3, T] of a pass."""
        parts, low = [], 0
        for chunk in chunks.chunks:
            high = low + chunk.end - chunk.start
            plain = chunks.positions[low:high]
            parts.append(
                chunk.images.positions(chunk.start, chunk.end).to(plain.device) if chunk.images else plain.expand(3, -1)
            )
            low = high
        return torch.cat(parts, dim=1)

    def _insert(self, chunks: PrefillPass, embeds_TE: torch.Tensor) -> dict[str, Any]:
        """Write the images' rows over the embeddings of their pads.

        Returns:
            The decoder's arguments for rows that it adds in its layers; empty if the model adds
            none.
        """
        seen_T = torch.zeros(len(embeds_TE), dtype=torch.bool, device=embeds_TE.device)
        added: list[tuple[torch.Tensor, ...]] = []
        offset = 0  # from an index in the sequence to one in the pass
        for chunk in chunks.chunks:
            offset -= chunk.start
            for image in chunk.images.images if chunk.images else ():
                start, end = max(image.start, chunk.start), min(image.end, chunk.end)
                if start >= end:
                    continue

                features = self._run_tower(image.patches)
                part = slice(start - image.start, end - image.start)
                embeds_TE[offset + start : offset + end] = features.rows_IE[part]
                seen_T[offset + start : offset + end] = True
                added.append(tuple(rows[part] for rows in features.added_IE))
            offset += chunk.end

        if not added or not added[0]:
            return {}
        return {
            "visual_pos_masks": seen_T[None],
            "deepstack_visual_embeds": [torch.cat(layer) for layer in zip(*added, strict=True)],
        }

    def _run_tower(self, patches: Patches) -> Features:
        """The tower's rows for an image, computed once for each version of the weights."""
        features = self._features.get(patches.key)
        if features is None:
            device = self._embed.weight.device
            out = self._body.get_image_features(patches.patches_NC.to(device), patches.grid_13.to(device))
            dtype = self._embed.weight.dtype
            added = tuple(rows[0].to(dtype) for rows in getattr(out, "deepstack_features", None) or ())
            features = Features(out.pooler_output[0].to(dtype), added)
            self._features.put(patches.key, features)
        return features
