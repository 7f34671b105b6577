"""The twin's tokenizer and model configuration, built from nothing.

    python recipes/gsm8k/twin/tokenizer.py --out DIR

writes a Hugging Face folder without weights; `sft.yaml` trains them. The build is deterministic.
"""

from __future__ import annotations

from pathlib import Path

from agentloop.imports import load_from_file
from recipes.small_model import build_tokenizer, rendered, run, write_folder

TEMPLATE = Path(__file__).with_name("model") / "chat_template.jinja"
"""ChatML with hermes tool calls, as in the quickstart: a tool is announced by its name and
argument names alone."""


def corpus(n: int = 4000) -> list[str]:
    """The texts that merges are learned from.

    They are the first conversations of the warm start: a change of its words or numbers may change
    the ids, and then the weights have to be made again.
    """
    problems = Path(__file__).parents[1] / "problems.py"  # in a copy of the recipe: the copy's
    warm_start = load_from_file(f"{problems}:warm_start", "warm_start")
    return rendered((row for row in warm_start(n, seed=0) if "messages" in row), TEMPLATE.read_text(encoding="utf-8"))


def write_model_folder(out: Path) -> None:
    """Everything of a model folder except the weights."""
    write_folder(out, build_tokenizer(corpus()), TEMPLATE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(write_model_folder, "Build the twin's tokenizer and configuration.")
