"""The checking tool remembers within an episode, and a check without gain costs a little."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentloop.data import load_tasks
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


@pytest.mark.parametrize("create_kwargs", [{}, {"ground_truth": None}])
async def test_the_rows_own_ground_truth_serves_when_the_tool_has_none(
    repo: Path, create_kwargs: dict[str, None]
) -> None:
    kwargs = {"tools_kwargs": {"calc_gsm8k_reward": {"create_kwargs": create_kwargs}}}
    session = make(repo, Task("0", "a", [], ground_truth="7", extra_info=kwargs))
    result = await session.call(ToolCall("calc_gsm8k_reward", {"answer": "7"}), 5)
    assert result.text.endswith("reward: 1")


async def test_a_row_without_ground_truth_fails_the_episode_not_the_model(repo: Path) -> None:
    session = make(repo, Task("3", "a", []))
    with pytest.raises(ToolError, match="row 3 has no ground truth"):
        await session.call(ToolCall("calc_gsm8k_reward", {"answer": "7"}), 5)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("1,234", "Current parsed answer: 1234, reward: 1"),
        ("#### 1234", "Current parsed answer: 1234, reward: 1"),
        ("\n 1234 ", "Current parsed answer: 1234, reward: 1"),
        ("1234 apples", "Current parsed answer: 1234, reward: 1"),
        ("so 1234", "Current parsed answer: none, give a plain number, reward: 0"),
        ("", "Current parsed answer: none, give a plain number, reward: 0"),
        ("9" * 100_000, "Current parsed answer: none, give a plain number, reward: 0"),
    ],
)
async def test_the_model_is_shown_the_number_that_was_read(repo: Path, given: str, text: str) -> None:
    session = make(repo, Task("0", "a", [], ground_truth="1,234"))
    assert (await session.call(ToolCall("calc_gsm8k_reward", {"answer": given}), 5)).text == text


async def test_parquet_may_fill_the_keys_of_other_tools_with_null(repo: Path, tmp_path: Path) -> None:
    """A column of structs has every key in every row: another tool's, another set's, and all four kwargs."""
    ours = {"calc_gsm8k_reward": {"create_kwargs": {"ground_truth": "7"}}}
    theirs = {"search": {"create_kwargs": {"ground_truth": {"target": ["x"]}, "data_source": "nq"}}}
    rows = [
        {"prompt": [{"role": "user", "content": "?"}], "extra_info": {"need_tools_kwargs": True, "tools_kwargs": ours}},
        {
            "prompt": [{"role": "user", "content": "?"}],
            "extra_info": {"tools_kwargs": theirs, "interaction_kwargs": {"name": "x"}},
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    tasks = load_tasks(str(tmp_path / "rows.parquet"), "data.train", "a")
    load_toolset(repo / "recipes" / "gsm8k" / "tools.yaml").check(tasks[0], "row 0")
    result = await make(repo, tasks[0]).call(ToolCall("calc_gsm8k_reward", {"answer": "7"}), 5)
    assert result.text.endswith("reward: 1") and result.reward == 0.0


async def test_two_episodes_of_a_row_share_no_state(repo: Path) -> None:
    tools = load_toolset(repo / "recipes" / "gsm8k" / "tools.yaml")
    sessions = [tools.session(Task("0", "a", [], ground_truth="7")) for _ in range(2)]
    call = ToolCall("calc_gsm8k_reward", {"answer": "7"})
    assert [(await session.call(call, 5)).reward for session in sessions] == [0.0, 0.0]
    assert (await sessions[0].call(call, 5)).reward == -0.05
