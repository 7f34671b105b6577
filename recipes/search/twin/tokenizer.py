"""The twin's tokenizer and model configuration, built from nothing.

    python recipes/search/twin/tokenizer.py --out DIR

writes a Hugging Face folder without weights; `sft.yaml` trains them. The build is deterministic.
A word of a name is always one token, the same one in a question, a passage, a call and an answer.
"""

from __future__ import annotations

from pathlib import Path

from agentloop.imports import load_from_file
from recipes.small_model import build_tokenizer, rendered, run, write_folder

TEMPLATE = Path(__file__).with_name("model") / "chat_template.jinja"
"""ChatML with hermes tool calls, as in the quickstart: a tool is announced by its name and
argument names alone."""


def corpus(n: int = 4000) -> list[str]:
    """The texts that merges are learned from: conversations of the warm start, which have each word
    of a name often enough.

    A change of their words may change the ids, and then the weights have to be made again.
    """
    conversations = load_from_file(f"{Path(__file__).with_name('data.py')}:conversations", "conversations")
    return rendered(conversations(n), TEMPLATE.read_text(encoding="utf-8"))


def write_model_folder(out: Path) -> None:
    """Write everything of a model folder except the weights."""
    tokenizer = build_tokenizer(corpus())
    template = TEMPLATE.read_text(encoding="utf-8")
    write_folder(out, tokenizer, template, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4)


if __name__ == "__main__":
    run(write_model_folder, "Build the twin's tokenizer and configuration.")
