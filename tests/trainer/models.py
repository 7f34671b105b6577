"""Tiny random models of several families, with norms and biases that are random too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 96
PAD, VISION_START, VISION_END = 90, 91, 92

TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.15,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {}),
    "gemma3": ("Gemma3", {}),
}
VISION: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qwen2_vl": ("Qwen2VL", 14, {"embed_dim": 32}),
    "qwen2_5_vl": ("Qwen2_5_VL", 14, {"window_size": 56, "fullatt_block_indexes": [1]}),
    "qwen3_vl": ("Qwen3VL", 16, {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}),
}
"""Class prefix, pixels of a patch's side, and what the tower has of its own."""


def save_tiny(folder: Path, kind: str, seed: int = 0, **overrides: Any) -> Path:
    """A folder with a random model of that family."""
    torch.manual_seed(seed)
    if kind in VISION:
        name, patch, own = VISION[kind]
        rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
        if kind == "qwen3_vl":
            rope["mrope_interleaved"] = True
        tower = {
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": patch,
            "spatial_merge_size": 2, "initializer_range": 0.15, "out_hidden_size": 32, **own,
        }  # fmt: skip
        config = getattr(transformers, f"{name}Config")(
            text_config={**TEXT, "rope_parameters": rope}, vision_config=tower, image_token_id=PAD, video_token_id=93,
            vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, tie_word_embeddings=True,
        )  # fmt: skip
        size = {"shortest_edge": patch * patch, "longest_edge": patch * patch * 400}
        transformers.Qwen2VLImageProcessorPil(patch_size=patch, size=size).save_pretrained(folder)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    else:
        name, own = FAMILIES[kind]
        config_class = getattr(transformers, f"{name}TextConfig" if kind == "gemma3" else f"{name}Config")
        model = getattr(transformers, f"{name}ForCausalLM")(config_class(**{**TEXT, **own, **overrides}))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.normal_(0.0 if kind.startswith("gemma") else 1.0, 0.2)
            elif "bias" in parameter_name:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return folder
