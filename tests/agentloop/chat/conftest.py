"""The Qwen tokenizer, loaded once: with and without the control tokens of the other templates."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from agentloop.chat import ChatRenderer

CONTROL = re.compile(
    r"<\|[\w▁]+\|>|<(?:bos|eos|sop|start_of_turn|end_of_turn|start_of_image|think|tool_call|arg_key|arg_value)>|</(?:think|\w+_call|arg_\w+)>"
    r"|\[gMASK\]"
)


@pytest.fixture(scope="session")
def qwen(shared: Path) -> Any:
    """The tokenizer as it is."""
    return PreTrainedTokenizerFast.from_pretrained(str(shared / "tokenizers" / "qwen"))


@pytest.fixture(scope="session")
def renderer_of(shared: Path) -> Callable[..., ChatRenderer]:
    """Makes the renderer of a template; the tokenizer holds the control tokens of all of them."""
    templates = {path.stem: path.read_text() for path in (shared / "chat_templates").glob("*.jinja")}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(shared / "tokenizers" / "qwen"))
    spellings = {token for template in templates.values() for token in CONTROL.findall(template)}
    tokenizer.add_tokens(sorted(spellings - set(tokenizer.get_vocab())), special_tokens=True)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    return lambda name, **options: ChatRenderer(tokenizer, chat_template=templates[name], **options)
