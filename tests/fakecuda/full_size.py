"""The models of the recipes at their full sizes: `config.json` as published, weight files that take no disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from agentloop.model_folder.pretrained import build_model, load_config
from agentloop.weights.layout import plan_file

TEXT: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "Qwen2.5-3B": {
        "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": {
        "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False,
    },
}  # fmt: skip
VISION_LANGUAGE = "Qwen2.5-VL-7B"
"""The language model is that of Qwen2.5-7B."""

NAMES = (*TEXT, VISION_LANGUAGE)

IMAGE_PAD, VISION_START, VISION_END, END = 151_655, 151_652, 151_653, 151_645
PATCH = 14


def write_model(folder: Path, name: str, **changes: Any) -> Path:
    """Write the folder of a model: `config.json`, the image processor's file, and bfloat16 weights.

    The weight file is sparse: zeros of the full size, of which only the header is on the disk.

    Args:
        changes: of values in `config.json`, such as fewer layers.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(name) | changes))
    if name == VISION_LANGUAGE:
        (folder / "preprocessor_config.json").write_text(json.dumps(_IMAGES))
    config = load_config(str(folder))
    with torch.device("meta"):
        lm = build_model(config, str(folder), dtype=torch.bfloat16)
    header, specs = plan_file(
        (_file_name(key), str(value.dtype).removeprefix("torch."), value.shape) for key, value in _stored(lm)
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(specs[-1].end)
    return folder


def config_of(name: str) -> dict[str, Any]:
    """The values of a published `config.json` that the code reads."""
    if name != VISION_LANGUAGE:
        return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **_text(TEXT[name])}
    return {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        **_text(TEXT["Qwen2.5-7B"]),
        "image_token_id": IMAGE_PAD, "video_token_id": 151_656,
        "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "model_type": "qwen2_5_vl", "depth": 32, "hidden_act": "silu", "hidden_size": 1280,
            "intermediate_size": 3420, "num_heads": 16, "in_chans": 3, "out_hidden_size": 3584, "patch_size": PATCH,
            "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112, "tokens_per_second": 2,
            "fullatt_block_indexes": [7, 15, 23, 31], "temporal_patch_size": 2,
        },
    }  # fmt: skip


_IMAGES = {
    "min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
}  # fmt: skip


def _text(sizes: dict[str, Any]) -> dict[str, Any]:
    return {
        **sizes, "hidden_act": "silu", "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "eos_token_id": END, "bos_token_id": 151_643, "use_sliding_window": False, "torch_dtype": "bfloat16",
    }  # fmt: skip


def _stored(lm: Any) -> Any:
    yield from lm.named_parameters()
    persistent = lm.state_dict().keys()
    yield from ((name, buffer) for name, buffer in lm.named_buffers() if name in persistent)


def _file_name(name: str) -> str:
    """The name of a tensor in the published files, which are older than the classes of today's transformers."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    return name.replace("model.language_model.", "model.")
