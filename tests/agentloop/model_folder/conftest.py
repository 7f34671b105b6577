"""Copies of the quickstart's model, to be damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file


class Copy:
    """A copy of a model folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights = path / "model.safetensors"

    def config(self, **changes: Any) -> None:
        """Change config.json; None removes a key."""
        file = self.path / "config.json"
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    def tensors(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change the tensors, in place."""
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights, metadata={"format": "pt"})


@pytest.fixture
def copied(quickstart_model: Path, tmp_path: Path) -> Copy:
    shutil.copytree(quickstart_model, tmp_path / "model")
    return Copy(tmp_path / "model")
