"""An exception of user code keeps its line: in the trace and in the report of the runner."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentloop.agent.base import AgentLoop
from agentloop.agent.runner import EpisodeRunner
from agentloop.client.client import version_number
from agentloop.config import RewardConfig, SamplingConfig
from agentloop.episode.episode import Episode
from agentloop.errors import ToolError
from agentloop.faults import LAST_FRAMES, Fault, make_fault, user_frames
from agentloop.interaction.base import Interaction, Response
from agentloop.interaction.loading import Interactions
from agentloop.reward.loading import close_reward, load_reward
from agentloop.tool.base import Tool
from agentloop.tool.session import Toolset
from agentloop.types import EpisodeStatus, Task, ToolResult, Trajectory

Make = Callable[..., EpisodeRunner]
Ids = Callable[[str], list[int]]
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12 * 34"}}\n</tool_call><|im_end|>'
ANSWER = "#### 408<|im_end|>"
SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {"name": "calculator", "parameters": {"properties": {"expression": {"type": "string"}}}},
}


def boom() -> Any:
    return {}["boom"]  # the user's line


LINE = boom.__code__.co_firstlineno + 1


async def faults_of(runner: EpisodeRunner, task: Task) -> tuple[Trajectory, list[Fault]]:
    trajectory = (
        await runner.run(task, group_id="g0", sample_index=1, sampling=SamplingConfig(max_new_tokens=99), seed=1)
    )[-1]
    assert Trajectory.from_json(json.loads(json.dumps(trajectory.to_json()))).faults == trajectory.faults
    return trajectory, trajectory.faults


class Agent(AgentLoop):
    async def run(self, episode: Episode) -> None:
        await episode.generate()
        boom()


class Raising(Tool):
    def __init__(self, where: str, error: Callable[[], Any] = boom) -> None:
        super().__init__({}, SCHEMA)
        self.where, self.error = where, error

    async def open(self, task: Task, **_: Any) -> Any:
        if self.where == "open":
            self.error()

    async def execute(self, state: Any, arguments: dict[str, Any], **_: Any) -> ToolResult:
        if self.where == "execute":
            self.error()
        return ToolResult("408")

    async def reward(self, state: Any, **_: Any) -> float | None:
        return float(self.error()) if self.where == "reward" else None

    async def close(self, state: Any, **_: Any) -> None:
        if self.where == "close":
            self.error()


class User(Interaction):
    async def respond(self, state: Any, messages: Any) -> Response:
        boom()
        return Response(done=True)


async def reward(task: Task, text: str, trajectory: Trajectory) -> float:
    return float(boom())


@pytest.mark.parametrize(
    ("source", "status", "changes"),
    [
        ("the agent tool_agent", EpisodeStatus.FAILED, {"agents": {"tool_agent": Agent}}),
        ("the reward", EpisodeStatus.FAILED, {"reward": reward}),
        ("a tool", EpisodeStatus.FAILED, {"toolset": Toolset([Raising("open")])}),
        ("the tool calculator", EpisodeStatus.OK, {"toolset": Toolset([Raising("execute")])}),
        ("the agent tool_agent", EpisodeStatus.FAILED, {"toolset": Toolset([Raising("reward")])}),
        ("the tool calculator", EpisodeStatus.OK, {"toolset": Toolset([Raising("close")])}),
        ("the interaction", EpisodeStatus.FAILED, {"interactions": Interactions({"user": User()})}),
    ],
)
async def test_each_kind_of_user_code_keeps_its_line(
    make_runner: Make, turn: Ids, task: Task, source: str, status: EpisodeStatus, changes: dict[str, Any]
) -> None:
    seen: list[tuple[Fault, str, str]] = []
    if "interactions" in changes:
        task.extra_info = {"interaction_kwargs": {"name": "user"}}
    runner = make_runner([turn(CALL), turn(ANSWER)], on_fault=lambda *a: seen.append(a), **changes)
    trajectory, [fault] = await faults_of(runner, task)
    assert trajectory.status is status
    assert (fault.source, fault.error, fault.where) == (source, "KeyError: 'boom'", f"{__file__}:{LINE}")
    assert fault.kind == f"KeyError at {__file__}:{LINE}"
    assert 'return {}["boom"]' in fault.traceback and "agentloop/agent/runner.py" not in fault.traceback
    assert seen == [(fault, "7", "g0/1")]


@pytest.mark.parametrize("run_in", ["thread", "process", "inline"])
async def test_a_reward_keeps_its_line_wherever_it_runs(
    make_runner: Make, turn: Ids, task: Task, tmp_path: Path, run_in: Any
) -> None:
    # A SystemExit on the event loop would end the program, as everywhere in Python.
    error = "OSError" if run_in == "inline" else "SystemExit"
    source = f"def score(task, text, trajectory):\n    return helper()\n\n\ndef helper():\n    raise {error}(3)\n"
    (tmp_path / "reward.py").write_text(source)
    scorer = load_reward(RewardConfig(function=f"{tmp_path / 'reward.py'}:score", run_in=run_in))
    try:
        trajectory, [fault] = await faults_of(make_runner([turn(ANSWER)], reward=scorer, reward_timeout_s=30.0), task)
    finally:
        close_reward(scorer)
    assert trajectory.status is EpisodeStatus.FAILED and fault.where.endswith("reward.py:6")
    assert "in score\n    return helper()" in fault.traceback and "agentloop/runtime" not in fault.traceback


async def test_failures_of_the_framework_are_no_faults(make_runner: Make, turn: Ids, task: Task) -> None:
    class Down:  # this file stands for an agent's; the error comes from within the framework
        async def generate(self, *args: Any, **kwargs: Any) -> Any:
            return version_number("broken")

    trajectory, faults = await faults_of(make_runner(Down()), task)
    assert trajectory.status is EpisodeStatus.FAILED and faults == []

    async def slow(task: Task, text: str, trajectory: Trajectory) -> float:
        await asyncio.sleep(30)
        return 0.0

    _, faults = await faults_of(make_runner([turn(ANSWER)], reward=slow, reward_timeout_s=0.02), task)
    assert faults == []


async def test_a_tool_error_of_the_user_is_shown_too(make_runner: Make, turn: Ids, task: Task) -> None:
    def down() -> None:
        raise ToolError("the database is down")

    toolset = Toolset([Raising("execute", down)])
    _, [fault] = await faults_of(make_runner([turn(CALL)], toolset=toolset), task)
    assert fault.error == "ToolError: the database is down" and "in down" in fault.traceback


def test_a_recursion_is_cut() -> None:
    def deeper(n: int) -> None:
        if not n:
            raise RecursionError("x" * 9999)
        deeper(n - 1)

    with pytest.raises(RecursionError) as caught:
        deeper(200)
    fault = make_fault("the reward", f"RecursionError: {caught.value}", user_frames(caught.value))
    assert "frames left out" in fault.traceback and fault.traceback.count("File ") == 4 + LAST_FRAMES
    assert len(fault.error) <= 2000
