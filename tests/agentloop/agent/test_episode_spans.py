"""The spans of an episode: turns, tool calls, interactions, rewards, and an agent's own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from agentloop import trace
from agentloop.agent.base import AgentLoop
from agentloop.agent.runner import EpisodeRunner
from agentloop.chat import ChatRenderer
from agentloop.config import SamplingConfig
from agentloop.episode.episode import Episode
from agentloop.interaction.base import Interaction, Response
from agentloop.interaction.loading import Interactions
from agentloop.testing import FakeGenerator
from agentloop.tool.base import Tool
from agentloop.tool.session import Toolset
from agentloop.types import EpisodeStatus, Span, StopReason, Task, ToolResult, Trajectory

CALL = '<tool_call>\n{"name": "look", "arguments": {"what": "a"}}\n</tool_call>'
END = "<|im_end|>"
ANSWER = f"done{END}"
SCHEMA = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "d",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]},
    },
}
Make = Callable[..., EpisodeRunner]
Ids = Callable[[str], list[int]]


class Look(Tool):
    """Answers, and sees the traceparent of its call; `behave` may raise or wait."""

    def __init__(self, behave: Callable[[], Any] = lambda: None) -> None:
        super().__init__({}, SCHEMA)
        self.behave = behave
        self.parents: list[str | None] = []

    async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        self.parents.append(trace.traceparent())
        with trace.span("query", table="orders"):
            result = self.behave()
            if asyncio.iscoroutine(result):
                await result
        return ToolResult("seen", reward=0.5)

    async def reward(self, state: Any, **calc_reward_kwargs: Any) -> float | None:
        return 2.0


class Ask(Interaction):
    """Says one thing, then is done."""

    async def respond(self, state: Any, messages: list[Any]) -> Response:
        done = sum(message["role"] == "user" for message in messages) > 1
        return Response([] if done else [{"role": "user", "content": "sure?"}], reward=0.25, done=done)


async def scored(task: Task, text: str, trajectory: Trajectory) -> float:
    assert trace.traceparent() is not None
    return 1.0


async def run(runner: EpisodeRunner, task: Task) -> list[Trajectory]:
    sampling = SamplingConfig(max_new_tokens=200)
    return await runner.run(task, group_id="g0", sample_index=0, sampling=sampling, seed=1)


def outline(spans: list[Span]) -> list[str]:
    """Each span indented below its parent, in the order of the start."""
    depth: dict[str | None, int] = {None: -1}
    lines = []
    for span in spans:
        depth[span.span_id] = depth[span.parent_id] + 1
        lines.append("  " * depth[span.span_id] + span.name + ("" if span.status == "ok" else f" {span.status}"))
    return lines


async def test_an_episode_records_what_it_did_and_repeats_no_text(make_runner: Make, turn: Ids, task: Task) -> None:
    tool = Look()
    task.extra_info["interaction_kwargs"] = {"name": "ask"}
    runner = make_runner(
        [turn(CALL + END), turn(ANSWER), turn(ANSWER)],
        toolset=Toolset([tool]),
        interactions=Interactions({"ask": Ask({})}),
        reward=scored,
        config={"max_response_tokens": 1000},
    )
    (trajectory,) = await run(runner, task)
    assert trajectory.status is EpisodeStatus.OK, trajectory.error
    spans = trajectory.spans
    assert outline(spans) == [
        "episode",
        "  turn",
        "    generate",
        "    parse",
        "  tool",
        "    query",
        "  turn",
        "    generate",
        "    parse",
        "  interaction",
        "  turn",
        "    generate",
        "    parse",
        "  interaction",
        "  reward",
        "  reward",
    ]
    turns = [span for span in spans if span.name == "turn"]
    assert [span.attributes for span in turns] == [{"request_id": turn.request_id} for turn in trajectory.turns]
    (call,) = [span for span in spans if span.name == "tool"]
    assert call.attributes == {"tool": "look", "call_id": trajectory.turns[0].tool_calls[0].id, "score": 0.5}
    assert tool.parents == [f"00-{trajectory.trace_id}-{call.span_id}-01"]
    asked = [span.attributes for span in spans if span.name == "interaction"]
    assert asked == [{"interaction": "ask", "score": 0.25}] * 2
    rewards = [span.attributes for span in spans if span.name == "reward"]
    assert rewards == [{"reward": "look", "score": 2.0}, {"reward": "reward", "score": 1.0}]
    assert "done" not in json.dumps(trajectory.to_json()["spans"])
    assert Trajectory.from_json(json.loads(json.dumps(trajectory.to_json()))) == trajectory


async def test_forks_and_own_spans_nest(make_runner: Make, turn: Ids, task: Task) -> None:
    class Planner(AgentLoop):
        async def run(self, episode: Episode) -> None:
            async def branch(number: int) -> None:
                fork = episode.fork([{"role": "user", "content": "try"}])
                with fork.span("branch", number=number):
                    await fork.generate()

            with episode.span("plan") as plan:
                await asyncio.gather(branch(0), branch(1))
                plan.set(branches=2)
            await episode.generate()

    runner = make_runner(lambda _: turn(ANSWER), agents={"tool_agent": Planner})
    trajectories = await run(runner, task)
    assert len({trajectory.trace_id for trajectory in trajectories}) == 1
    assert [len(trajectory.spans) > 0 for trajectory in trajectories] == [False, False, True]
    spans = trajectories[-1].spans
    names = {span.span_id: span for span in spans}
    branches = [span for span in spans if span.name == "branch"]
    assert [span.attributes for span in branches] == [{"number": 0}, {"number": 1}]
    parents = [names[span.parent_id].name for span in spans if span.name == "turn" and span.parent_id]
    assert parents == ["branch", "branch", "episode"]
    (plan,) = [span for span in spans if span.name == "plan"]
    assert plan.attributes == {"branches": 2} and {span.parent_id for span in branches} == {plan.span_id}


async def test_a_tool_that_raises_and_one_that_is_stopped(make_runner: Make, turn: Ids, task: Task) -> None:
    def broken() -> None:
        raise KeyError("orders")

    turns = [turn(CALL + END), turn(ANSWER)]
    (trajectory,) = await run(make_runner(turns, toolset=Toolset([Look(broken)])), task)
    assert outline(trajectory.spans)[4:6] == ["  tool error", "    query error"]
    assert "KeyError" in str(trajectory.spans[4].error) and trajectory.spans[0].status == "ok"

    slow = make_runner(turns, toolset=Toolset([Look(lambda: asyncio.sleep(30))]), config={"episode_timeout_s": 0.02})
    (trajectory,) = await run(slow, task)
    assert trajectory.stop_reason is StopReason.TIMEOUT
    assert outline(trajectory.spans)[4:6] == ["  tool cancelled", "    query cancelled"]
    assert trajectory.spans[0].status == "ok"  # it is scored


async def test_a_failed_episode_says_why(make_runner: Make, turn: Ids, task: Task) -> None:
    class Broken(AgentLoop):
        async def run(self, episode: Episode) -> None:
            with episode.span("plan"):
                raise ValueError("no plan")

    (trajectory,) = await run(make_runner([], agents={"tool_agent": Broken}), task)
    assert outline(trajectory.spans) == ["episode error", "  plan error"]
    assert "no plan" in str(trajectory.spans[0].error)


async def test_a_limit_is_not_an_error(make_runner: Make, turn: Ids, task: Task) -> None:
    runner = make_runner([turn(CALL + END)], toolset=Toolset([Look()]), config={"max_assistant_turns": 1})
    (trajectory,) = await run(runner, task)
    assert trajectory.stop_reason is StopReason.MAX_TURNS
    assert {span.status for span in trajectory.spans} == {"ok"}


async def test_spans_change_no_token_and_no_seed(
    make_runner: Make, turn: Ids, task: Task, renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def sampled() -> tuple[Trajectory, FakeGenerator]:
        generator = FakeGenerator([turn(CALL + END), turn(ANSWER)], stop_ids=frozenset({renderer.end_of_turn}))
        return (await run(make_runner(generator, toolset=Toolset([Look()])), task))[-1], generator

    with_spans, first = await sampled()
    monkeypatch.setattr("agentloop.trace.spans.MOST_SPANS", 1)
    monkeypatch.setattr("agentloop.trace.spans.Recorder.__init__.__kwdefaults__", {"limit": 1, "expected": ()})
    without, second = await sampled()
    assert len(without.spans) == 1 and len(with_spans.spans) > 5
    assert list(with_spans.token_ids) == list(without.token_ids) and first.sampling == second.sampling
    assert [turn.sampled_digest for turn in with_spans.turns] == [turn.sampled_digest for turn in without.turns]
