"""The real tokenizer and chat templates of `token_law.py` and `loop_overhead.py`, kept beside the repository."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"

CONTROL = re.compile(r"<\|[^|<>\s]+\|>|</?[a-z]+(?:_[a-z]+)+>|</?think>|<bos>|<eos>|<sop>|\[gMASK\]")
"""How the templates spell control tokens: `<|im_end|>`, `<start_of_turn>`, `</tool_call>`, ..."""


def add_tokenizer_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=SHARED / "tokenizers" / "qwen",
        help="folder with tokenizer.json (../shared/tokenizers/qwen beside the repository)",
    )


def existing(path: Path, option: str) -> Path:
    """`path`, or the end of the program with what to do.

    Raises:
        SystemExit: it is not there.
    """
    if not path.exists():
        raise SystemExit(f"{path} is not there: name the real one with {option}")
    return path


def load_qwen(folder: Path) -> Any:
    """The fast tokenizer in `folder`, without importing torch."""
    from transformers import PreTrainedTokenizerFast

    existing(folder / "tokenizer.json", "--tokenizer")
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def load_with_controls(folder: Path, templates: dict[str, str]) -> Any:
    """The tokenizer with the control tokens of all `templates` added, so that each can be used with it."""
    tokenizer = load_qwen(folder)
    spelled = {token for template in templates.values() for token in CONTROL.findall(template)}
    tokenizer.add_tokens(sorted(spelled - set(tokenizer.get_vocab())), special_tokens=True)
    return tokenizer
