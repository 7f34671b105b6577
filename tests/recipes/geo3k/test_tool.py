"""The checking tool compares in a process, remembers within an episode, and prices idle checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentloop.errors import ToolError
from agentloop.tool.loading import load_toolset
from agentloop.types import Task, ToolCall


async def test_checks_are_scored_and_remembered(repo: Path) -> None:
    toolset = load_toolset(repo / "recipes" / "geo3k" / "tools.yaml")
    kwargs = {"tools_kwargs": {"calc_geo3k_reward": {"create_kwargs": {"ground_truth": "5\\sqrt{3}"}}}}
    session = toolset.session(Task("0", "a", [], extra_info=kwargs))
    found = []
    for answer in ("5", "\\boxed{\\sqrt{75}}", "5\\sqrt{3}", "9^{9^{9^{9}}}"):
        result = await session.call(ToolCall("calc_geo3k_reward", {"answer": answer}), 60)
        found.append((result.reward, result.text.rsplit(" ", 1)[1]))
    assert found == [(-0.05, "0"), (0.0, "1"), (-0.05, "1"), (-0.05, "0")]
    assert await session.rewards() == {"calc_geo3k_reward": 1.0}
    await session.close()

    with pytest.raises(ToolError, match="row 3 has no ground truth"):
        await toolset.session(Task("3", "a", [])).call(ToolCall("calc_geo3k_reward", {"answer": "1"}), 5)
    toolset.close()
