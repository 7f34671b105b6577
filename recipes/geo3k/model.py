"""A random Qwen2.5-VL of 0.4 M parameters with a tokenizer of its own, for smoke runs on a CPU.

    python model.py --out model

The same folder each time. It is too small to solve a problem, and takes the path of a large one:
image processor, vision tower, M-RoPE, chat template with tools.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from data import INSTRUCTION, SYSTEM_PROMPT  # type: ignore[import-not-found]  # beside this script
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
VOCAB_SIZE = 1024
CONTEXT = 4096

PATCH, MERGE = 14, 2
MOST_IMAGE_TOKENS = 128
"""Larger images are scaled down by the image processor: a CPU computes each token."""

TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
    "tie_word_embeddings": True,
}
TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "window_size": 8 * PATCH,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 64,
}

CORPUS = [
    "Find x. Find y. Find m \\angle A B C. Find the area of the figure. Find the perimeter of the parallelogram. "
    "Round to the nearest tenth if necessary. Assume that segments that appear to be tangent are tangent. ",
    "You may call one or more functions to assist with the user query. You are provided with function signatures "
    'within XML tags: {"type": "function", "function": {"name": "calc_geo3k_reward", "description": "", "parameters": '
    '{"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}}} For each function '
    "call, return a json object with function name and arguments: <function-name>, <args-json-object> "
    "Check an answer to the problem. The reward is 1 if it is right and 0 if it is not. Current parsed answer: reward: "
    "The answer that you would put in \\boxed{}, in LaTeX. You are a helpful assistant.",
]
"""Text of prompts, from which merges are learned: a prompt should take a few hundred tokens."""


def build_tokenizer() -> Tokenizer:
    """Train a byte-level BPE that splits words like Qwen2's, and append the control tokens."""
    qwen = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = qwen.normalizer
    tokenizer.pre_tokenizer = qwen.pre_tokenizer
    tokenizer.decoder = qwen.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(TAGS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, INSTRUCTION, SYSTEM_PROMPT], trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in TAGS])
    return tokenizer


def write_model(out: Path, seed: int) -> int:
    """Write a whole model folder, completely or not at all; return its number of parameters."""
    tokenizer = build_tokenizer()
    ids = {text: tokenizer.token_to_id(text) for text in SPECIAL}
    ends = {"bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, **ends},
        vision_config=TOWER,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        **ends,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as partial:
        folder = Path(partial) / "model"
        model.save_pretrained(folder)
        side = PATCH * MERGE
        size = {"shortest_edge": 4 * side**2, "longest_edge": MOST_IMAGE_TOKENS * side**2}
        Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, size=size).save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        folder.rename(out)
    return int(model.num_parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the small random model of the smoke runs.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist yet")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"{given.out} already exists: choose another folder, or remove it")
    print(f"{write_model(given.out, given.seed):,} parameters -> {given.out}")


if __name__ == "__main__":
    main()
