"""Every limit of an episode: what happens at it, and the stop reason that says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from agentloop.agent.base import AgentLoop
from agentloop.agent.runner import EpisodeRunner
from agentloop.chat import ChatRenderer
from agentloop.config import SamplingConfig
from agentloop.episode.episode import Episode, EpisodeEnd
from agentloop.episode.law import check_trajectory
from agentloop.testing import FakeGenerator
from agentloop.types import EpisodeStatus, StopReason, Task, Trajectory

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12 * 34"}}\n</tool_call>'
END = "<|im_end|>"
ANSWER = "#### 408" + END
Make = Callable[..., EpisodeRunner]
Ids = Callable[[str], list[int]]


async def run_all(runner: EpisodeRunner, task: Task, max_new_tokens: int = 200) -> list[Trajectory]:
    sampling = SamplingConfig(max_new_tokens=max_new_tokens)
    return await runner.run(task, group_id="g", sample_index=0, sampling=sampling, seed=1)


async def run(runner: EpisodeRunner, task: Task, max_new_tokens: int = 200) -> Trajectory:
    return (await run_all(runner, task, max_new_tokens))[-1]


def told(trajectory: Trajectory) -> list[str]:
    return [str(m["content"]) for m in trajectory.messages if m["role"] == "tool"]


class Asks(AgentLoop):
    """Asks again after every answer."""

    async def run(self, episode: Episode) -> None:
        while True:
            await episode.generate()
            episode.observe({"role": "user", "content": "And?"}, {"role": "user", "content": "Well?"})


class Branches(AgentLoop):
    """Answers, and lets two forks answer at the same time."""

    async def run(self, episode: Episode) -> None:
        await episode.generate()
        forks = [episode.fork(), episode.fork()]
        for fork in forks:
            fork.observe({"role": "user", "content": "Again."})
        await asyncio.gather(*(fork.generate() for fork in forks))


async def test_tokens_of_a_turn_are_bounded_by_the_agent_too(make_runner: Make, turn: Ids, task: Task) -> None:
    generator = FakeGenerator([turn(CALL + END)])
    trajectory = await run(make_runner(generator, config={"max_turn_tokens": 7}), task)
    assert generator.sampling[0].max_new_tokens == 7
    assert trajectory.stop_reason is StopReason.LENGTH and trajectory.turns[0].stop_reason is StopReason.LENGTH
    generator = FakeGenerator([turn(ANSWER)])
    await run(make_runner(generator, config={"max_turn_tokens": 7}), task, max_new_tokens=3)
    assert generator.sampling[0].max_new_tokens == 3, "the recipe's sampling may ask for less"


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        ({"max_response_tokens": 9}, {}, StopReason.LENGTH),
        ({"max_episode_tokens": 9}, {}, StopReason.EPISODE_TOKENS),
        ({}, {"context_length": 9}, StopReason.CONTEXT),
    ],
)
async def test_a_turn_that_a_budget_cuts_ends_the_episode_with_its_reason(
    make_runner: Make,
    turn: Ids,
    task: Task,
    renderer: ChatRenderer,
    calculator: Any,
    config: dict[str, Any],
    changes: dict[str, int],
    reason: StopReason,
) -> None:
    if changes:
        changes = {"context_length": len(renderer.start(task.prompt, calculator.schemas)) + 9}
    trajectory = await run(make_runner([turn(CALL + END)], config=config, **changes), task)
    assert trajectory.sampled_tokens == 9 and trajectory.turns[0].stop_reason is StopReason.LENGTH
    assert (trajectory.stop_reason, trajectory.status) == (reason, EpisodeStatus.OK)


async def test_tokens_of_an_episode_are_counted_over_its_forks(make_runner: Make, turn: Ids, task: Task) -> None:
    class Waits(FakeGenerator):
        async def generate(self, *args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(0)
            return await super().generate(*args, **kwargs)

    def runner(limit: int | None) -> EpisodeRunner:
        generator = Waits([turn(ANSWER)] * 3, stop_ids=frozenset(turn(END)))
        config = {"max_episode_tokens": limit, "max_turn_tokens": len(turn(ANSWER))}
        return make_runner(generator, agents={"tool_agent": Branches}, config=config)

    each = len(turn(ANSWER))
    free = await run_all(runner(None), task)
    assert [t.sampled_tokens for t in free] == [each] * 3 and free[-1].stop_reason is StopReason.STOP
    bounded = await run_all(runner(2 * each), task)
    assert sum(t.sampled_tokens for t in bounded) == 2 * each
    assert bounded[-1].stop_reason is StopReason.EPISODE_TOKENS, "the one that is counted says why the episode ended"


async def test_turns_of_the_assistant_are_counted_over_its_forks(make_runner: Make, turn: Ids, task: Task) -> None:
    runner = make_runner([turn(ANSWER)] * 3, agents={"tool_agent": Branches}, config={"max_assistant_turns": 2})
    trajectories = await run_all(runner, task)
    assert sum(len(t.turns) for t in trajectories) == 2
    assert trajectories[-1].stop_reason is StopReason.MAX_TURNS


@pytest.mark.parametrize("limit", [0, 1, 2, None])
async def test_turns_of_the_user_are_bounded(make_runner: Make, turn: Ids, task: Task, limit: int | None) -> None:
    runner = make_runner([turn(ANSWER)] * 5, agents={"tool_agent": Asks}, config={"max_user_turns": limit})
    trajectory = await run(runner, task)
    asked = sum(m["content"] == "And?" for m in trajectory.messages)
    if limit is None:
        assert trajectory.stop_reason is StopReason.MAX_TURNS
    else:
        assert (trajectory.stop_reason, asked, len(trajectory.turns)) == (StopReason.MAX_USER_TURNS, limit, limit + 1)
        assert trajectory.metrics["user_turns"] == limit
    assert trajectory.status is EpisodeStatus.OK


async def test_tool_answers_are_no_turns_of_the_user(make_runner: Make, turn: Ids, task: Task) -> None:
    trajectory = await run(make_runner([turn(CALL + END), turn(ANSWER)], config={"max_user_turns": 0}), task)
    assert trajectory.stop_reason is StopReason.STOP and len(trajectory.turns) == 2


async def test_calls_beyond_the_episodes_limit_are_answered_and_one_more_ends_it(
    make_runner: Make, turn: Ids, task: Task
) -> None:
    config = {"max_calls_per_episode": 2, "max_response_tokens": 2000, "max_assistant_turns": 9}
    one, two = turn(CALL + END), turn(CALL * 2 + END)
    obedient = await run(make_runner([one, two, turn(ANSWER)], config=config), task)
    assert obedient.stop_reason is StopReason.STOP
    assert told(obedient)[:2] == ["408", "408"]
    assert told(obedient)[2].startswith("Error: all 2 tool calls are used up")
    exact = await run(make_runner([two, turn(ANSWER)], config=config), task)
    assert exact.stop_reason is StopReason.STOP and told(exact) == ["408", "408"]
    stubborn = await run(make_runner([two, one, one, turn(ANSWER)], config=config), task)
    assert stubborn.stop_reason is StopReason.MAX_TOOL_CALLS and stubborn.status is EpisodeStatus.OK
    assert len(stubborn.turns) == 3 and len(told(stubborn)) == 3
    assert stubborn.metrics["tool_calls"] == 3 and stubborn.metrics["tool_errors"] == 1


async def test_both_limits_of_calls_hold_in_one_turn(make_runner: Make, turn: Ids, task: Task) -> None:
    config = {"max_calls_per_episode": 3, "max_calls_per_turn": 2, "max_response_tokens": 2000}
    four = turn(CALL * 4 + END)
    trajectory = await run(make_runner([four, four, turn(ANSWER)], config=config), task)
    per_turn, used_up = "Error: only 2 calls are run", "Error: all 3 tool calls"
    begins = [message.split(" in one turn")[0].split(" are used")[0] for message in told(trajectory)]
    assert begins == ["408", "408", per_turn, per_turn, "408", used_up, per_turn, per_turn]
    assert trajectory.stop_reason is StopReason.STOP


class Slow:
    """A generator that never answers."""

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(60)


async def test_an_episode_whose_clock_runs_out_while_the_model_speaks_ends_by_timeout(
    make_runner: Make, turn: Ids, task: Task
) -> None:
    fast = FakeGenerator([turn(CALL + END)], stop_ids=frozenset(turn(END)))

    class SlowSecond(Slow):
        async def generate(self, *args: Any, **kwargs: Any) -> Any:
            return await (super() if fast.prompts else fast).generate(*args, **kwargs)

    trajectory = await run(make_runner(SlowSecond(), config={"episode_timeout_s": 0.05}), task)
    assert (trajectory.stop_reason, trajectory.status) == (StopReason.TIMEOUT, EpisodeStatus.OK)
    assert len(trajectory.turns) == 1
    check_trajectory(trajectory)


async def test_a_fork_that_runs_out_ends_the_episode_with_its_reason(make_runner: Make, turn: Ids, task: Task) -> None:
    seen: list[StopReason] = []

    class Tries(AgentLoop):
        async def run(self, episode: Episode) -> None:
            await episode.generate()
            fork = episode.fork()
            fork.observe({"role": "user", "content": "x"})
            try:
                await fork.generate()
            except EpisodeEnd as end:
                seen.extend([end.reason, fork.stop_reason])
                raise

    config = {"max_assistant_turns": 1}
    trajectory = await run(make_runner([turn(ANSWER)], agents={"tool_agent": Tries}, config=config), task)
    assert seen == [StopReason.MAX_TURNS] * 2 and trajectory.stop_reason is StopReason.MAX_TURNS


async def test_a_rewritten_history_is_a_trajectory_of_its_own(
    make_runner: Make, turn: Ids, task: Task, renderer: ChatRenderer
) -> None:
    class Compacts(AgentLoop):
        async def run(self, episode: Episode) -> None:
            await episode.generate()
            episode.add_reward("first", 0.5)
            episode.rewrite([{"role": "user", "content": "So far: 400 + 8."}])
            episode.add_reward("early", 0.25)  # before the new history has a turn: of the last one before it
            await episode.generate()
            episode.add_reward("second", 1.0)

    generator = FakeGenerator([turn("400 and 8" + END), turn(ANSWER)], stop_ids=frozenset(turn(END)))
    first, last = await run_all(make_runner(generator, agents={"tool_agent": Compacts}), task)
    assert renderer.decode(generator.prompts[1]).count("<|im_start|>user") == 1
    assert [(t.turns[0].order, t.turns[0].text, t.sampled_tokens) for t in (first, last)] == [
        (0, "400 and 8", len(turn("400 and 8" + END))),
        (1, "#### 408", len(turn(ANSWER))),
    ]
    assert [r.name for r in first.step_rewards] == ["first", "early"] and last.step_rewards[0].name == "second"
    assert last.metrics["forks"] == 1 and last.reward == 1.75
    assert generator.sampling[0].sampling_seed != generator.sampling[1].sampling_seed
