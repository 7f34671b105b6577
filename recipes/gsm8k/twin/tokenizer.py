"""The twin's tokenizer and model configuration, built from nothing.

    python recipes/gsm8k/twin/tokenizer.py --out DIR

writes a Hugging Face folder without weights; `sft.yaml` trains them. The build is deterministic.

256 bytes (any text can be encoded), 7 tags, and merges that make every word of the problems one
token. A model of half a million parameters reads words that way, where it would have to read
letters, and a prompt takes a third of the tokens. A digit is always one token, alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from agentloop.imports import load_from_file

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
TEMPLATE = Path(__file__).with_name("model") / "chat_template.jinja"
"""ChatML with hermes tool calls, as in the quickstart: a tool is announced by its name and
argument names alone."""

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.06,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "use_cache": True,
    "dtype": "float32",
}


def corpus(n: int = 4000) -> list[str]:
    """The texts that merges are learned from, split at the tags, which are never merged.

    They are the first conversations of the warm start: a change of its words or numbers may change
    the ids, and then the weights have to be made again.
    """
    problems = Path(__file__).parents[1] / "problems.py"  # in a copy of the recipe: the copy's
    warm_start = load_from_file(f"{problems}:warm_start", "warm_start")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = json.dumps
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    texts = [template.render(**row) for row in warm_start(n, seed=0) if "messages" in row]
    for tag in SPECIAL + TAGS:
        texts = [part for text in texts for part in text.split(tag)]
    return texts


def build_tokenizer() -> Tokenizer:
    """Train the byte-level BPE and append the tags. Decoding keeps the hermes tags (not "special").

    The text is split into words like Qwen2's tokenizer does (digits one by one). Any other split
    would be lost: transformers picks the tokenizer class by model type, and the class has its own.
    """
    qwen = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = qwen.normalizer
    tokenizer.pre_tokenizer = qwen.pre_tokenizer
    tokenizer.decoder = qwen.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # more than there are: it ends when every word is one token
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in TAGS])
    return tokenizer


def write_model_folder(out: Path) -> None:
    """Everything of a model folder except the weights."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save(str(out / "tokenizer.json"))
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    ids = {
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
    }
    documents = {
        "config.json": CONFIG | ids,
        "generation_config.json": {
            "eos_token_id": [end, pad],
            "pad_token_id": pad,
            "do_sample": True,
            "temperature": 1.0,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    template = TEMPLATE.read_text(encoding="utf-8")
    (out / TEMPLATE.name).write_text(template, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the twin's tokenizer and configuration.")
    parser.add_argument("--out", type=Path, required=True)
    write_model_folder(parser.parse_args().out)


if __name__ == "__main__":
    main()
