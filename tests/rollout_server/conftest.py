"""Tiny random models, the engine's core over them, and the server in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from agentloop.config.server import ServerSettings
from rollout_server.api.app import build_app
from rollout_server.engines.torch_engine.create import create_torch_engine
from rollout_server.engines.torch_engine.engine import TorchEngine
from rollout_server.replica.local import LocalReplica
from rollout_server.router.router import Router
from tests.rollout_server.support import save_model

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A test that left more threads to those after it would make them many times slower where cores are shared."""
    yield
    assert torch.get_num_threads() == 1, "set it back to one at the end of the test"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 with grouped queries and an end token."""
    return save_model(tmp_path_factory.mktemp("qwen2"), "qwen2", seed=0)


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights: the next policy version."""
    return save_model(tmp_path_factory.mktemp("qwen2-v1"), "qwen2", seed=1)


@pytest.fixture
async def engine_factory(model_dir: Path) -> AsyncIterator[Callable[..., TorchEngine]]:
    """Make engines with settings; they are closed at the end of the test."""
    engines: list[TorchEngine] = []

    def make(**options: Any) -> TorchEngine:
        engines.append(create_torch_engine(ServerSettings(**{"model": str(model_dir), **options})))
        return engines[-1]

    yield make
    for engine in engines:
        await engine.close()


@pytest.fixture
async def client(engine_factory: Callable[..., TorchEngine], other_weights: Path) -> AsyncIterator[httpx.AsyncClient]:
    """The server over a real engine, without sockets. Weights may be read from the folder of `other_weights` only."""
    settings = ServerSettings(model="in this process", weights_roots=(other_weights,))
    app = build_app(Router([LocalReplica(engine_factory())]), settings=settings)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
        yield http
