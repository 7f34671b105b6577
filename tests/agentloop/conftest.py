"""Parts of an episode without a server: the quickstart's tokenizer, its tools, a scripted generator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentloop.agent.runner import EpisodeRunner
from agentloop.agent.tool_agent import ToolAgent
from agentloop.chat import ChatRenderer, load_tokenizer
from agentloop.config import AgentConfig
from agentloop.testing import FakeGenerator
from agentloop.tool.loading import load_toolset
from agentloop.tool.session import Toolset
from agentloop.types import Task


@pytest.fixture(scope="session")
def renderer(quickstart_model: Path) -> ChatRenderer:
    return ChatRenderer(load_tokenizer(str(quickstart_model)))


@pytest.fixture(scope="session")
def calculator(repo: Path) -> Toolset:
    return load_toolset(repo / "recipes" / "quickstart" / "tools.yaml")


@pytest.fixture
def task() -> Task:
    return Task(
        task_id="7",
        agent_name="tool_agent",
        prompt=[{"role": "system", "content": "Answer."}, {"role": "user", "content": "What is 12 * 34?"}],
        ground_truth="408",
    )


@pytest.fixture
def turn(renderer: ChatRenderer) -> Callable[[str], list[int]]:
    """Ids of a sampled turn, control tokens of the text being control tokens."""
    return lambda text: renderer.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="session")
def make_runner(renderer: ChatRenderer, calculator: Toolset) -> Callable[..., EpisodeRunner]:
    """A runner over a scripted generator; keywords change its parts."""

    def make(turns: Any, *, config: dict[str, Any] | None = None, **changes: Any) -> EpisodeRunner:
        generator = (
            turns if hasattr(turns, "generate") else FakeGenerator(turns, stop_ids=frozenset({renderer.end_of_turn}))
        )
        parts: dict[str, Any] = {
            "renderer": renderer,
            "generator": generator,
            "agents": {"tool_agent": ToolAgent},
            "limits": {"tool_agent": AgentConfig(**(config or {}))},
            "reward_timeout_s": 1.0,
            "toolset": calculator,
            "reward": None,
            "context_length": 4096,
        }
        return EpisodeRunner(**{**parts, **changes})

    return make
