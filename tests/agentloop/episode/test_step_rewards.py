"""Rewards inside of an episode: they reach the trajectory with the turn that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agentloop.agent.base import AgentLoop
from agentloop.agent.runner import EpisodeRunner
from agentloop.config import SamplingConfig
from agentloop.episode.episode import Episode
from agentloop.tool.base import Tool
from agentloop.tool.session import Toolset
from agentloop.types import EpisodeStatus, Task, ToolResult, Trajectory

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12 * 34"}}\n</tool_call>'
END = "<|im_end|>"
ANSWER = "#### 408" + END
Make = Callable[..., EpisodeRunner]
Ids = Callable[[str], list[int]]


class Rewards(Tool):
    """Gives the next of `values` with each call, and `verdict` in the end."""

    def __init__(self, values: list[Any], verdict: float | None = None) -> None:
        super().__init__({}, {"type": "function", "function": {"name": "calculator", "parameters": {"properties": {}}}})
        self.schema["function"]["parameters"]["additionalProperties"] = True
        self.values = iter(values)
        self.verdict = verdict

    async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        return ToolResult("x", reward=next(self.values))

    async def reward(self, state: Any, **calc_reward_kwargs: Any) -> float | None:
        return self.verdict


async def run_all(runner: EpisodeRunner, task: Task) -> list[Trajectory]:
    return await runner.run(task, group_id="g", sample_index=0, sampling=SamplingConfig(max_new_tokens=200))


async def outcome(task: Task, text: str, trajectory: Trajectory) -> dict[str, float]:
    return {"score": 0.5, "format": 1.0}


def spans(trajectory: Trajectory) -> list[tuple[int, float]]:
    """(number of the turn, value) of each step reward."""
    turns = [(turn.start, turn.end) for turn in trajectory.turns]
    return [(turns.index((r.start, r.end)), r.value) for r in trajectory.step_rewards]


async def test_a_tools_reward_belongs_to_the_turn_that_made_the_call(make_runner: Make, turn: Ids, task: Task) -> None:
    turns = [turn(CALL * 2 + END), turn(CALL + END), turn(ANSWER)]
    tool = Rewards([1.0, None, -0.25], verdict=2.0)
    runner = make_runner(turns, toolset=Toolset([tool]), config={"max_response_tokens": 900}, reward=outcome)
    [trajectory] = await run_all(runner, task)
    assert spans(trajectory) == [(0, 1.0), (1, -0.25)]
    assert trajectory.reward_parts == {"calculator": 2.75, "format": 1.0}, (
        "a tool's verdict and its step rewards add up"
    )
    assert (trajectory.reward, trajectory.outcome) == (0.5, 0.5)
    assert Trajectory.from_json(trajectory.to_json()) == trajectory


async def test_without_a_reward_function_the_reward_is_the_sum_of_all_steps(
    make_runner: Make, turn: Ids, task: Task
) -> None:
    class Forks(AgentLoop):
        async def run(self, episode: Episode) -> None:
            first = await episode.generate()
            fork = episode.fork()
            fork.add_reward("plan", 0.5)  # the fork has not spoken: it is for the turn before it
            fork.observe({"role": "user", "content": "x"})
            await fork.generate()
            fork.add_reward("work", 0.25)
            episode.observe({"role": "user", "content": "y"})
            await episode.generate()
            episode.add_reward("plan", 1.0, first)

    runner = make_runner([turn(ANSWER)] * 3, agents={"tool_agent": Forks})
    fork, main = await run_all(runner, task)
    assert spans(fork) == [(0, 0.25)] and spans(main) == [(0, 0.5), (0, 1.0)]
    for trajectory in (fork, main):
        assert (trajectory.reward, trajectory.outcome) == (1.75, None)
        assert trajectory.reward_parts == {"plan": 1.5, "work": 0.25}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_a_step_reward_that_is_no_number_fails_the_episode(
    make_runner: Make, turn: Ids, task: Task, value: float
) -> None:
    for tool in (Rewards([value]), Rewards([1.0], verdict=value)):
        [trajectory] = await run_all(
            make_runner([turn(CALL + END), turn(ANSWER)], toolset=Toolset([tool]), reward=outcome), task
        )
        assert trajectory.status is EpisodeStatus.FAILED and trajectory.reward is None
        assert "not a finite number" in (trajectory.error or "")


async def test_a_step_reward_needs_a_turn_of_its_own_trajectory(make_runner: Make, turn: Ids, task: Task) -> None:
    class Early(AgentLoop):
        async def run(self, episode: Episode) -> None:
            episode.add_reward("early", 1.0)

    class Foreign(AgentLoop):
        async def run(self, episode: Episode) -> None:
            first = await episode.generate()
            episode.fork().add_reward("foreign", 1.0, first)

    for agent, says in ((Early, "before the first turn"), (Foreign, "a turn of another trajectory")):
        [trajectory] = await run_all(make_runner([turn(ANSWER)], agents={"tool_agent": agent}), task)
        assert trajectory.status is EpisodeStatus.FAILED and says in (trajectory.error or "")
