"""The checking tool remembers within an episode, and a check without gain costs a little."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentloop.errors import ToolError
from agentloop.tool.loading import load_toolset
from agentloop.types import Task, ToolCall


def make(repo: Path, task: Task):  # type: ignore[no-untyped-def]
    return load_toolset(repo / "recipes" / "gsm8k" / "tools.yaml").session(task)


async def test_checks_are_scored_and_remembered(repo: Path) -> None:
    kwargs = {"tools_kwargs": {"calc_gsm8k_reward": {"create_kwargs": {"ground_truth": "1,234"}}}}
    session = make(repo, Task("0", "a", [], extra_info=kwargs))
    rewards = []
    for answer in ("5", "1234", "1234"):
        result = await session.call(ToolCall("calc_gsm8k_reward", {"answer": answer}), 5)
        rewards.append((result.reward, result.text.rsplit(" ", 1)[1]))
    assert rewards == [(-0.05, "0"), (0.0, "1"), (-0.05, "1")]
    assert await session.rewards() == {"calc_gsm8k_reward": 1.0}
    await session.close()


async def test_the_rows_own_ground_truth_serves_when_the_tool_has_none(repo: Path) -> None:
    session = make(repo, Task("0", "a", [], ground_truth="7"))
    result = await session.call(ToolCall("calc_gsm8k_reward", {"answer": "7"}), 5)
    assert result.text.endswith("reward: 1")


async def test_a_row_without_ground_truth_fails_the_episode_not_the_model(repo: Path) -> None:
    session = make(repo, Task("3", "a", []))
    with pytest.raises(ToolError, match="row 3 has no ground truth"):
        await session.call(ToolCall("calc_gsm8k_reward", {"answer": "7"}), 5)
