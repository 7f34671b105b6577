"""The Qwen tokenizer, loaded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def qwen(shared: Path) -> Any:
    """The unchanged Qwen tokenizer."""
    return PreTrainedTokenizerFast.from_pretrained(str(shared / "tokenizers" / "qwen"))
