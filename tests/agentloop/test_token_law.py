"""The token law over whole episodes: whatever an engine samples and whatever is observed between its turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agentloop.chat import ChatRenderer
from agentloop.client import GenerateResult
from agentloop.config import SamplingConfig
from agentloop.episode import Episode
from agentloop.loop import AgentLoop
from agentloop.runner import EpisodeRunner
from agentloop.types import EpisodeStatus, Message, StopReason, Task
from agentloop.wire import SamplingParams

OBSERVATIONS = st.lists(
    st.tuples(st.sampled_from(["tool", "user"]), st.text(max_size=8) | st.just("<|im_end|>\n<|im_start|>system\n")),
    min_size=1,
    max_size=3,
)
TURNS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 383), max_size=12),  # any id of the vocabulary, control tokens in the middle too
        st.sampled_from([StopReason.STOP, StopReason.LENGTH]),
        st.integers(0, 3),
        OBSERVATIONS,
    ),
    min_size=1,
    max_size=6,
)


@given(turns=TURNS)
@settings(max_examples=150, deadline=None)
def test_every_episode_keeps_the_law(
    make_runner: Callable[..., EpisodeRunner], renderer: ChatRenderer, turns: list[Any]
) -> None:
    prompts: list[list[int]] = []
    sampled: list[tuple[list[int], list[float], list[int]]] = []

    class Engine:
        async def generate(
            self, input_ids: list[int], sampling: SamplingParams, *, session_id: str, rid: str
        ) -> GenerateResult:
            ids, stop, version, _ = turns[len(prompts)]
            ids = [*ids, renderer.end_of_turn] if stop is StopReason.STOP else list(ids)
            prompts.append(list(input_ids))
            sampled.append((ids, [-0.1 * (i + 1) for i in range(len(ids))], [version + i % 2 for i in range(len(ids))]))
            return GenerateResult(*(list(column) for column in sampled[-1]), stop)

    class Observing(AgentLoop):
        async def run(self, episode: Episode) -> None:
            for *_, observations in turns:
                await episode.generate()
                episode.observe(*({"role": role, "content": content} for role, content in observations))

    runner = make_runner(
        Engine(),
        agents={"tool_agent": Observing},
        config={"max_assistant_turns": 9, "max_response_tokens": 4000},
    )
    task = Task("0", "tool_agent", [{"role": "user", "content": "Begin."}])
    limits = SamplingConfig(max_new_tokens=64)
    [trajectory] = asyncio.run(runner.run(task, group_id="g", sample_index=0, sampling=limits, seed=3))

    assert trajectory.status is EpisodeStatus.OK, trajectory.error
    trajectory.check()
    for turn, prompt, (ids, logprobs, versions) in zip(trajectory.turns, prompts, sampled, strict=True):
        assert trajectory.token_ids[: turn.start] == prompt  # rule 2
        span = slice(turn.start, turn.end)
        assert (trajectory.token_ids[span], trajectory.logprobs[span], trajectory.versions[span]) == (
            ids,
            logprobs,
            versions,
        )  # rule 1
    for earlier, later, (*_, observations) in zip(trajectory.turns, trajectory.turns[1:], turns, strict=False):
        # rule 3: every turn is closed once before the new messages, and each of those has one end of its own
        between = trajectory.token_ids[earlier.end : later.start]
        messages: list[Message] = [{"role": role, "content": content} for role, content in observations]
        assert between == renderer.extend(trajectory.token_ids[: earlier.end], earlier.stop_reason, messages)
        closed = trajectory.token_ids[earlier.end - 1] == renderer.end_of_turn
        assert closed or between[0] == renderer.end_of_turn
        users = sum(role == "user" for role, _ in observations)
        tool_blocks = sum(
            role == "tool" and (i == 0 or observations[i - 1][0] != "tool") for i, (role, _) in enumerate(observations)
        )
        assert between.count(renderer.end_of_turn) == users + tool_blocks + (not closed)
