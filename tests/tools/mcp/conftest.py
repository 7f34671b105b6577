"""Fixtures of MCP servers: a tool YAML with one entry, and servers behind HTTP."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentloop.tool.loading import load_toolset
from agentloop.tool.session import Toolset
from tests.tools.mcp.support import RAW, Behind, Load
from tools.mcp import server, stdio


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that do not end by themselves are ended sooner, and the bound of a message is low."""
    monkeypatch.setattr(stdio, "GRACE_S", 0.1)
    monkeypatch.setattr(stdio, "MOST_BYTES", 2**20)
    monkeypatch.setattr(server, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """Load a tool YAML with one entry; keywords are its config."""
    made: list[Toolset] = []

    def load(**config: Any) -> Toolset:
        if "raw" in config:
            config["command"] = [sys.executable, str(RAW), config.pop("raw")]
        path = tmp_path / "tools.yaml"
        path.write_text(yaml.safe_dump({"tools": [{"class_name": "mcp", "config": config}]}))
        made.append(load_toolset(path))
        return made[-1]

    yield load
    for toolset in made:
        toolset.close()


@pytest.fixture(params=["http", "sse"])
def behind(request: pytest.FixtureRequest) -> Iterator[Behind]:
    running = Behind(request.param)
    running.start()
    yield running
    running.stop()
