"""What all tests share: one thread per process, and the material beside the repository when it is there."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported anywhere: several test processes share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data, tokenizers and templates, kept beside the repository or named by AGENTLOOP_SHARED."""
    folder = Path(os.environ.get("AGENTLOOP_SHARED", REPO.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no real material in {folder}: set AGENTLOOP_SHARED")
    return folder


@pytest.fixture(scope="session")
def quickstart_model(repo: Path) -> Path:
    """The warm-started model that the quickstart begins with."""
    return repo / "recipes" / "quickstart" / "model"
