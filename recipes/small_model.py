"""Tokenizer and configuration of the twins' models: a Hugging Face folder without weights.

`gsm8k/twin/tokenizer.py` and `search/twin/tokenizer.py` call it with the texts of their tasks;
`agentloop sft` adds the weights. The build is deterministic.

256 bytes (any text can be encoded), the tags, and merges that make every word of the task one
token. A model of half a million parameters reads words that way, where it would have to read
letters, and a prompt takes a third of the tokens. A digit is always one token, alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

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


def rendered(rows: Iterable[dict[str, Any]], template: str) -> list[str]:
    """Return conversations (`messages`, `tools`) as the chat template writes them."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = json.dumps
    compiled = environment.from_string(template)
    return [compiled.render(**row) for row in rows]


def build_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Train the byte-level BPE and append the tags. Decoding keeps the hermes tags (not "special").

    The text is split into words like Qwen2's tokenizer does (digits one by one). Any other split
    would be lost: transformers picks the tokenizer class by model type, and the class has its own.

    Args:
        texts: what the merges are learned from; it is split at the tags, which are never merged.
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
    parts = list(texts)
    for tag in (*SPECIAL, *TAGS):
        parts = [part for text in parts for part in text.split(tag)]
    tokenizer.train_from_iterator(parts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in TAGS])
    return tokenizer


def write_folder(out: Path, tokenizer: Tokenizer, template: str, **changes: Any) -> None:
    """Write everything of a model folder except the weights.

    Args:
        changes: keys of `config.json` that differ from `CONFIG`.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    ids = {
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
    }
    documents = {
        "config.json": CONFIG | changes | ids,
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
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")


def run(write_model_folder: Callable[[Path], None], description: str) -> None:
    """Run a program with the option `--out DIR`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    write_model_folder(parser.parse_args().out)
