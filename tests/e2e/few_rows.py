"""The first rows of the quickstart: a start renders and checks every row, and a small run trains on few of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

COUNT = 256


def train_rows() -> list[dict[str, Any]]:
    """The training rows of small runs."""
    data = Path(__file__).resolve().parents[2] / "recipes" / "quickstart" / "data.py"
    spec = importlib.util.spec_from_file_location("quickstart_data", data)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.rows("train", COUNT))
