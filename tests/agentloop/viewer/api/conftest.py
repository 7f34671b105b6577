"""The application over a folder with one run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentloop.viewer import create_app
from tests.agentloop.viewer.api.material import make_run

Get = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture(scope="session")
def made_run(tmp_path_factory: pytest.TempPathFactory, quickstart_model: Path) -> Path:
    """A run of three steps of two groups of four episodes. Tests do not change it."""
    return make_run(tmp_path_factory.mktemp("runs") / "sums", quickstart_model)


def getter(*roots: Path) -> Get:
    """Return a function that asks a new application over some roots."""
    app: Any = create_app(list(roots))

    async def get(path: str, **parameters: Any) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
            return await http.get(path, params=parameters or None)

    return get


@pytest.fixture(scope="session")
def get(made_run: Path) -> Get:
    """Ask the application over the folder of `made_run`."""
    return getter(made_run.parent)
