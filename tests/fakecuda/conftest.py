"""Tests on fake cards: `make test-fakecuda` preloads `runtime.c` into SGLang's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakecuda.cards import RANK, RANKS, FakeCards, process_group
from tests.fakecuda.full_size import write_model

ModelFactory = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def fake_runtime() -> Iterator[None]:
    """The tests have fake cards and nothing else."""
    if not torch.cuda.is_available() or torch.cuda.get_device_name(0) != "fake card":
        pytest.skip("CUDA's runtime is not replaced here: make test-fakecuda")
    with pytest.MonkeyPatch.context() as patch:
        # transformers converts the tensors of a checkpoint on threads; fake tensors are for one thread at a time.
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
        yield


@pytest.fixture
def cards(fake_runtime: None) -> Iterator[FakeCards]:
    """Fake tensors for the length of a test."""
    with FakeCards()() as made:
        yield made


@pytest.fixture
def rank(fake_runtime: None) -> Iterator[None]:
    """A process group of RANKS ranks, of which this process is RANK."""
    with process_group(RANK, RANKS):
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """Makes the folder of a model, once for each name and its changes."""
    made: dict[str, Path] = {}

    def folder(name: str, **changes: Any) -> Path:
        key = f"{name}{changes or ''}"
        if key not in made:
            made[key] = write_model(tmp_path_factory.mktemp("models") / "model", name, **changes)
        return made[key]

    return folder
