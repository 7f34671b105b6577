"""Whatever stands in a fine-tuning row: it is tokenized, or an error names its row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from agentloop.config import SftModel
from agentloop.errors import DataError
from tests.mutations import fuzzed, mutated
from trainer.sft.tokenizing import SftTokenizer

CALL = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "1 + 1"}}}
PARAMETERS = {"type": "object", "properties": {"expression": {"type": "string", "enum": None}}, "required": []}
TOOLS = [{"type": "function", "function": {"name": "calculator", "description": "", "parameters": PARAMETERS}}]
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "Answer."},
            {"role": "user", "content": "What is 1 + 1?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL], "train": False},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "2", "weight": 1},
        ],
        "tools": TOOLS,
    },
    {"text": "12\n12\n", "loss_from": 3},
]


@pytest.fixture(scope="module")
def tokenizer(quickstart_model: Path) -> SftTokenizer:
    return SftTokenizer.load(SftModel(path=str(quickstart_model)), 4096)


@fuzzed
@given(case=mutated(ROWS))
def test_fine_tuning_rows(tokenizer: SftTokenizer, case: Any) -> None:
    row, _ = case
    try:
        found = tokenizer.row(row, "here, row 7")
    except DataError as exc:
        assert "here, row 7" in exc.message and exc.hint, exc
        return
    assert found is not None and found.loss_mask.any() and not found.loss_mask[0]
