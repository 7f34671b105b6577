"""The token law over whole episodes: whatever an engine samples and whatever is observed between its turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentloop.agent.base import AgentLoop
from agentloop.agent.runner import EpisodeRunner
from agentloop.chat import ChatRenderer
from agentloop.client.client import GenerateResult
from agentloop.config import SamplingConfig
from agentloop.episode.episode import Episode
from agentloop.episode.law import check_episode, check_trajectory, extend_digest
from agentloop.episode.ledger import TokenLedger
from agentloop.errors import LawRule, TokenLawError
from agentloop.testing import FakeGenerator
from agentloop.types import EpisodeStatus, Message, StopReason, Task, Trajectory
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
    check_trajectory(trajectory)
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


# -- planted violations: each rule is broken inside of an episode, and the runner rejects it with the rule ------------

ANSWER = "#### 408<|im_end|>"


class Twice(AgentLoop):
    """Answers, is asked again, answers again; then `plant` breaks what the ledger holds."""

    async def run(self, episode: Episode) -> None:
        await episode.generate()
        self.between(episode)
        episode.observe({"role": "user", "content": "Again."})
        await episode.generate()
        self.plant(episode)

    def between(self, episode: Episode) -> None: ...

    def plant(self, episode: Episode) -> None: ...


def change(ledger: TokenLedger, name: str, edit: Callable[[list[Any]], None]) -> None:
    """Put an edited copy in the place of a column: the columns themselves refuse to be written to."""
    column = getattr(ledger, name)
    entries = list(column)
    edit(entries)
    setattr(ledger, name, type(column)(entries))


def put(place: int, value: Any) -> Callable[[list[Any]], None]:
    return lambda entries: entries.__setitem__(place, value)


class EncodesAgain(Twice):
    """Puts other ids of the same text in the place of sampled ones."""

    def plant(self, episode: Episode) -> None:
        turn = episode.turns[1]
        change(episode._branch.ledger, "_token_ids", put(turn.end - 2, 0))


class ShiftsItsMask(Twice):
    def plant(self, episode: Episode) -> None:
        change(episode._branch.ledger, "_mask", lambda mask: mask.append(mask.pop(episode.turns[1].start) and 0))


class TrainsItsPrompt(Twice):
    def plant(self, episode: Episode) -> None:
        for column, value in (("_mask", 1), ("_logprobs", -0.5), ("_versions", 0)):
            change(episode._branch.ledger, column, put(0, value))


class LosesALogprob(Twice):
    def plant(self, episode: Episode) -> None:
        change(episode._branch.ledger, "_logprobs", put(episode.turns[0].start, None))


class ChangesItsHistory(Twice):
    def between(self, episode: Episode) -> None:
        change(episode._branch.ledger, "_token_ids", put(0, episode._branch.ledger.token_ids[0] + 1))


class ChangesItsHistoryInTheEnd(Twice):
    def plant(self, episode: Episode) -> None:
        change(episode._branch.ledger, "_token_ids", put(1, episode._branch.ledger.token_ids[1] + 1))


class SlipsATokenIn(Twice):
    """Writes an id behind the ledger's back, with all its columns."""

    def between(self, episode: Episode) -> None:
        for column, value in (("_token_ids", 7), ("_mask", 0), ("_logprobs", None), ("_versions", None)):
            change(episode._branch.ledger, column, lambda entries, value=value: entries.append(value))  # type: ignore[misc]


class ForksWithItsMask(Twice):
    def plant(self, episode: Episode) -> None:
        copied, own = episode.fork()._branch.ledger, episode._branch.ledger
        copied._mask, copied._logprobs, copied._versions = deepcopy((own._mask, own._logprobs, own._versions))
        copied.turns, copied._prompt_length = list(own.turns), own.prompt_length


class DropsAVersion(Twice):
    def plant(self, episode: Episode) -> None:
        change(episode._branch.ledger, "_versions", lambda versions: versions.pop())


class LengthensItsMask(Twice):
    def plant(self, episode: Episode) -> None:
        change(episode._branch.ledger, "_mask", lambda mask: mask.append(0))


class RewardsTheQuestion(Twice):
    def plant(self, episode: Episode) -> None:
        episode.add_reward("asked", 1.0)
        episode.step_rewards[0].start = 0


@pytest.mark.parametrize(
    ("agent", "rule"),
    [
        (EncodesAgain, LawRule.SAMPLED),
        (ShiftsItsMask, LawRule.SAMPLED),
        (TrainsItsPrompt, LawRule.SAMPLED),
        (LosesALogprob, LawRule.SAMPLED),
        (ChangesItsHistory, LawRule.PROMPT),
        (ChangesItsHistoryInTheEnd, LawRule.PROMPT),
        (SlipsATokenIn, LawRule.PROMPT),
        (ForksWithItsMask, LawRule.TRAINED_TWICE),
        (DropsAVersion, LawRule.COLUMNS),
        (LengthensItsMask, LawRule.COLUMNS),
        (RewardsTheQuestion, LawRule.STEP_REWARD),
        (Twice, None),
    ],
)
async def test_a_planted_violation_is_rejected_with_its_rule(
    make_runner: Callable[..., EpisodeRunner],
    renderer: ChatRenderer,
    turn: Callable[[str], list[int]],
    task: Task,
    agent: type[AgentLoop],
    rule: LawRule | None,
) -> None:
    generator = FakeGenerator([turn(ANSWER)] * 2, stop_ids=frozenset({renderer.end_of_turn}))
    runner = make_runner(generator, agents={"tool_agent": agent})
    trajectories = await runner.run(task, group_id="g", sample_index=0, sampling=SamplingConfig(max_new_tokens=50))
    for trajectory in trajectories:
        assert trajectory.broken_rule == rule
        if rule is None:
            assert (trajectory.status, trajectory.error) == (EpisodeStatus.OK, None)
        else:
            assert trajectory.status is EpisodeStatus.REJECTED and trajectory.error and trajectory.reward is None


async def test_an_engine_that_changes_the_prompt_it_was_given_is_found_out(
    make_runner: Callable[..., EpisodeRunner], turn: Callable[[str], list[int]], task: Task
) -> None:
    class Scribbles(FakeGenerator):
        async def generate(self, input_ids: Any, *args: Any, **kwargs: Any) -> GenerateResult:
            with pytest.raises(TypeError):
                input_ids[2] += 1
            input_ids._data[2] += 1  # behind the column's back
            return await super().generate(input_ids, *args, **kwargs)

    [trajectory] = await make_runner(Scribbles([turn(ANSWER)])).run(
        task, group_id="g", sample_index=0, sampling=SamplingConfig(max_new_tokens=50)
    )
    assert (trajectory.status, trajectory.broken_rule) == (EpisodeStatus.REJECTED, "prompt")


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), max_size=9))
def test_a_digest_that_grows_is_that_of_the_whole(parts: list[list[int]]) -> None:
    digest, whole = 0, []
    for part in parts:
        digest = extend_digest(digest, part)
        whole += part
    assert digest == extend_digest(0, whole)


async def test_every_turn_has_a_request_of_its_own_and_the_digest_of_what_was_sent(
    make_runner: Callable[..., EpisodeRunner], turn: Callable[[str], list[int]], task: Task
) -> None:
    class Engine(FakeGenerator):
        requests: list[str] = []  # noqa: RUF012

        async def generate(self, *args: Any, rid: str, **kwargs: Any) -> GenerateResult:
            self.requests.append(rid)
            return await super().generate(*args, rid=rid, **kwargs)

    engine = Engine([turn(ANSWER)] * 2, stop_ids=frozenset(turn("<|im_end|>")))
    [trajectory] = await make_runner(engine, agents={"tool_agent": Twice}).run(
        task, group_id="g", sample_index=0, sampling=SamplingConfig(max_new_tokens=50)
    )
    assert [t.request_id for t in trajectory.turns] == engine.requests and len(set(engine.requests)) == 2
    assert [t.prompt_digest for t in trajectory.turns] == [extend_digest(0, prompt) for prompt in engine.prompts]
    assert [t.order for t in trajectory.turns] == [0, 1]
    again = Trajectory.from_json(trajectory.to_json())
    assert again == trajectory
    check_trajectory(again)


def test_a_trace_of_before_is_still_read() -> None:
    ledger = TokenLedger()
    ledger.add_prompt([1, 2])
    data = ledger.trajectory().to_json()
    for field in ("outcome", "step_rewards", "broken_rule"):
        del data[field]
    read = Trajectory.from_json(data)
    assert (read.step_rewards, read.outcome, read.broken_rule) == ([], None, None)


def test_a_turn_may_stand_in_one_trajectory_of_an_episode_only() -> None:
    def trained(request: str) -> Trajectory:
        from agentloop.types import Turn

        ledger = TokenLedger()
        ledger.add_prompt([1, 2])
        ledger.add_sampled(Turn(0, 0, "", StopReason.STOP, request_id=request), [3], [-0.5], [0])
        return ledger.trajectory()

    check_episode([trained("a"), trained("b")])
    with pytest.raises(TokenLawError, match=r"request a .* trajectories 1 and 3 of 3") as caught:
        check_episode([trained("a"), trained("b"), trained("a")])
    assert caught.value.rule is LawRule.TRAINED_TWICE
