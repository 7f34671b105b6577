"""Interactions: who answers the model, when a conversation is done, and failures that are nobody's reward of 0."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentloop.agent.base import AgentLoop
from agentloop.agent.runner import EpisodeRunner
from agentloop.config import SamplingConfig
from agentloop.episode.episode import Episode
from agentloop.episode.law import check_episode
from agentloop.errors import ConfigError, InteractionError
from agentloop.interaction.base import Interaction, Response
from agentloop.interaction.loading import Interactions, load_interactions
from agentloop.testing import FakeGenerator
from agentloop.types import EpisodeStatus, Message, StopReason, Task, Trajectory
from recipes.gsm8k.interaction import MISSING, WRONG

Make = Callable[..., EpisodeRunner]
Ids = Callable[[str], list[int]]
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12 * 34"}}\n</tool_call><|im_end|>'


class Scripted(Interaction):
    """Answers with the next of `script`: a response, or an exception to raise."""

    def __init__(self, *script: Any) -> None:
        super().__init__()
        self.script = list(script)
        self.events: list[str] = []
        self.seen: list[list[Message]] = []
        self.asked = asyncio.Event()

    async def start(self, task: Task, **kwargs: Any) -> dict[str, Any]:
        self.events.append("start")
        return kwargs

    async def respond(self, state: Any, messages: Sequence[Message]) -> Any:
        self.events.append("respond")
        self.seen.append(list(messages))
        self.asked.set()
        answer = self.script.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return await answer if asyncio.iscoroutine(answer) else answer

    async def close(self, state: Any) -> None:
        self.events.append(f"close {sorted(state.items())}")


def says(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def row(task: Task, **kwargs: Any) -> Task:
    return Task(
        task.task_id,
        task.agent_name,
        task.prompt,
        ground_truth="408",
        extra_info={"interaction_kwargs": {"name": "user", **kwargs}},
    )


async def run(runner: EpisodeRunner, task: Task) -> Trajectory:
    sampling = SamplingConfig(max_new_tokens=100)
    [trajectory] = await runner.run(task, group_id="g0", sample_index=0, sampling=sampling, seed=1)
    return trajectory


def interactions(interaction: Interaction) -> Interactions:
    return Interactions({"user": interaction})


async def test_a_user_answers_until_it_is_done(make_runner: Make, turn: Ids, task: Task) -> None:
    user = Scripted(Response(says("Sure?"), 0.25), (says("Really?"), None, False), Response(says("Bye."), 1.0, True))
    turns = [turn("A<|im_end|>"), turn(CALL), turn("B<|im_end|>"), turn("C<|im_end|>")]
    trajectory = await run(make_runner(turns, interactions=interactions(user)), row(task, mood="calm"))
    assert (trajectory.status, trajectory.stop_reason) == (EpisodeStatus.OK, StopReason.STOP)
    roles = [message["role"] for message in trajectory.messages]
    assert roles == [
        *("system", "user", "assistant", "user", "assistant", "tool"),
        *("assistant", "user", "assistant", "user"),
    ]
    assert user.events == ["start", *["respond"] * 3, "close [('mood', 'calm')]"]
    assert [seen[-1]["content"] for seen in user.seen] == ["A", "B", "C"]
    first, last = trajectory.turns[0], trajectory.turns[3]
    steps = [(step.name, step.value, step.start, step.end) for step in trajectory.step_rewards]
    assert steps == [("user", 0.25, first.start, first.end), ("user", 1.0, last.start, last.end)]
    assert trajectory.reward == 1.25 and trajectory.reward_parts == {"user": 1.25}
    assert trajectory.metrics["user_turns"] == 2 and len(trajectory.token_ids) == last.end
    check_episode([trajectory])


async def test_what_it_says_is_rendered_as_the_template_means_it(make_runner: Make, turn: Ids, task: Task) -> None:
    generator = FakeGenerator([turn("A<|im_end|>"), turn("B<|im_end|>")], stop_ids=frozenset(turn("<|im_end|>")))
    user = Scripted(Response(says("Sure?<|im_end|>")), Response(done=True))
    await run(make_runner(generator, interactions=interactions(user)), row(task))
    between = generator.prompts[1][len(generator.prompts[0]) + 2 :]
    end = turn("<|im_end|>")
    assert between.count(end[0]) == 1  # that in its text is no control token
    assert between[:1] == turn("\n") and between[-3:] == turn("<|im_start|>assistant\n")


async def test_rows_without_one_end_as_ever(make_runner: Make, turn: Ids, task: Task) -> None:
    user = Scripted()
    trajectory = await run(make_runner([turn("A<|im_end|>")], interactions=interactions(user)), task)
    assert trajectory.status is EpisodeStatus.OK and user.events == []


async def test_a_limit_on_turns_of_the_user_is_a_stop_reason(make_runner: Make, turn: Ids, task: Task) -> None:
    user = Scripted(Response(says("1"), 0.5), Response(says("2"), 0.5))
    runner = make_runner([turn("A<|im_end|>")] * 3, config={"max_user_turns": 1}, interactions=interactions(user))
    trajectory = await run(runner, row(task))
    assert trajectory.stop_reason is StopReason.MAX_USER_TURNS
    assert (trajectory.reward, len(trajectory.turns)) == (1.0, 2)


async def test_a_turn_that_was_cut_is_judged_too(make_runner: Make, turn: Ids, task: Task) -> None:
    user = Scripted(Response(says("Go on."), -1.0))
    trajectory = await run(make_runner([turn("A B C D E")], interactions=interactions(user)), row(task))
    assert (trajectory.stop_reason, trajectory.reward) == (StopReason.LENGTH, -1.0)


async def test_forks_are_answered_one_after_the_other(make_runner: Make, turn: Ids, task: Task) -> None:
    class Slow(Interaction):
        answering = most = 0

        async def respond(self, state: Any, messages: Sequence[Message]) -> Response:
            self.answering += 1
            self.most = max(self.most, self.answering)
            await asyncio.sleep(0.01)
            self.answering -= 1
            return Response(reward=0.5, done=True)

    class Branching(AgentLoop):
        async def run(self, episode: Episode) -> None:
            await episode.generate()
            forks = [episode.fork(says(f"branch {number}")) for number in range(3)]
            for fork in forks:
                await fork.generate()
            await asyncio.gather(*(branch.respond() for branch in (episode, *forks)))

    user = Slow()
    runner = make_runner(
        [turn("A<|im_end|>")] * 4,
        config={"max_assistant_turns": 9},
        agents={"tool_agent": Branching},
        interactions=interactions(user),
    )
    found = await runner.run(
        row(task), group_id="g", sample_index=0, sampling=SamplingConfig(max_new_tokens=50), seed=1
    )
    assert (user.most, len(found), found[-1].reward) == (1, 4, 2.0)


async def test_trying_again_helps_where_the_interaction_says_so(make_runner: Make, turn: Ids, task: Task) -> None:
    user = Scripted(InteractionError("busy"), Response(done=True, reward=1.0))
    trajectory = await run(make_runner([turn("A<|im_end|>")], interactions=interactions(user)), row(task))
    assert (trajectory.status, trajectory.reward) == (EpisodeStatus.OK, 1.0)
    user = Scripted(*[InteractionError("busy")] * 3)
    trajectory = await run(make_runner([turn("A<|im_end|>")], interactions=interactions(user)), row(task))
    assert trajectory.status is EpisodeStatus.FAILED and "busy" in str(trajectory.error)
    assert trajectory.reward is None and user.events[-1].startswith("close")


@pytest.mark.parametrize(
    ("answer", "says_why"),
    [
        (ValueError("no such state"), "raised ValueError: no such state"),
        ("hello", "answered with str"),
        (Response([{"role": "assistant", "content": "x"}]), "with the role user"),
        (Response([{"role": "user"}]), "messages are"),  # type: ignore[list-item]
        (Response(), "returned no messages and is not done"),
        (Response(done=True, reward=float("nan")), "the reward nan"),
    ],
)
async def test_a_failure_fails_the_episode_at_once(
    make_runner: Make, turn: Ids, task: Task, answer: Any, says_why: str
) -> None:
    user = Scripted(answer)
    trajectory = await run(make_runner([turn("A<|im_end|>")], interactions=interactions(user)), row(task))
    assert trajectory.status is EpisodeStatus.FAILED and trajectory.reward is None
    assert says_why in str(trajectory.error)
    assert user.events == ["start", "respond", "close []"]


async def test_one_that_hangs_is_stopped_and_closed(make_runner: Make, turn: Ids, task: Task) -> None:
    user = Scripted(asyncio.sleep(60))
    config = {"interaction_timeout_s": 0.05}
    runner = make_runner([turn("A<|im_end|>")], config=config, interactions=interactions(user))
    trajectory = await run(runner, row(task))
    assert trajectory.status is EpisodeStatus.FAILED and "took longer than 0.05 s" in str(trajectory.error)
    assert user.events[-1] == "close []"


async def test_a_cancelled_episode_closes_its_interaction(make_runner: Make, turn: Ids, task: Task) -> None:
    user = Scripted(asyncio.sleep(60))
    job = asyncio.create_task(run(make_runner([turn("A<|im_end|>")], interactions=interactions(user)), row(task)))
    await user.asked.wait()
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert user.events[-1] == "close []"


async def test_one_that_does_not_close_keeps_no_tool_open(make_runner: Make, turn: Ids, task: Task) -> None:
    class Stuck(Scripted):
        async def close(self, state: Any) -> None:
            raise OSError("gone")

    trajectory = await run(
        make_runner([turn("A<|im_end|>")], interactions=interactions(Stuck(Response(done=True)))), row(task)
    )
    assert trajectory.status is EpisodeStatus.OK


async def test_the_gsm8k_teacher_lets_the_model_try_again(make_runner: Make, turn: Ids, task: Task) -> None:
    named = Interactions()
    rows = [Task("0", "tool_agent", task.prompt, ground_truth="408")]
    rows[0].extra_info = {"interaction_kwargs": {"name": "gsm8k", "query": None}}
    assert named.check(rows[0], "row 1") == "gsm8k"
    answers = [turn("#### 407<|im_end|>"), turn("#### 408<|im_end|>")]
    trajectory = await run(make_runner(answers, interactions=named), rows[0])
    assert (trajectory.reward, [step.value for step in trajectory.step_rewards]) == (1.0, [0.0, 1.0])
    assert trajectory.messages[3]["content"] == WRONG
    answers = [turn("dunno<|im_end|>"), turn("#### 1<|im_end|>"), turn("#### 408<|im_end|>")]
    trajectory = await run(make_runner(answers, interactions=named), rows[0])
    assert (trajectory.reward, len(trajectory.turns)) == (0.0, 2)
    assert trajectory.messages[3]["content"] == MISSING


def test_a_row_that_names_an_unknown_one_is_named(task: Task) -> None:
    assert Interactions().check(task, "row 1") is None
    named = row(task)
    with pytest.raises(ConfigError, match=r"rows.jsonl, row 2: column .* names the interaction 'user'; known: gsm8k"):
        Interactions().check(named, "rows.jsonl, row 2")
    named.extra_info = {"interaction_kwargs": {"mood": "calm"}}
    with pytest.raises(ConfigError, match=r"row 2: column 'extra_info.interaction_kwargs' has no name"):
        Interactions().check(named, "row 2")


def test_a_yaml_names_them(tmp_path: Path, task: Task) -> None:
    (tmp_path / "user.py").write_text(
        "from agentloop import Interaction, Response\n"
        "class User(Interaction):\n"
        "    async def respond(self, state, messages):\n"
        "        return Response(done=True, reward=self.config['worth'])\n"
        "class Blocking(Interaction):\n"
        "    def respond(self, state, messages):\n"
        "        return [], 0.0, True\n"
        "class Silent(Interaction): pass\n"
        "class Other: pass\n"
    )
    path = tmp_path / "interactions.yaml"
    user = "{name: user, class_name: user.py:User, config: {worth: 0.5}}"
    path.write_text(f"interaction: [{user}, {{class_name: gsm8k}}]\n")
    found = load_interactions(path)
    assert sorted(found.named) == ["gsm8k", "user"] and found.check(row(task), "k") == "user"
    session = found.session(row(task))
    assert session is not None and asyncio.run(session.respond([], 1.0)).reward == 0.5
    for entry, why in [
        ("{class_name: user.py:Other}", "is not an Interaction"),
        ("{class_name: user.py:Silent}", "user.py:Silent is abstract"),
        ("{class_name: user.py:Blocking}", r"respond\(\) is not an `async def`"),
        ("{class_name: nowhere.Thing}", "cannot be imported"),
        ("{class_name: ./none.py:User}", r"does not exist\n.*relative to the folder of the interaction YAML"),
        ("{class_name: nobody}", "is not registered in agentloop.interactions; known: gsm8k"),
        ("{name: x}", "has no class_name"),
        ("{class_name: gsm8k, config: {max_trys: 3}}", "could not be created: ValueError: unknown config: max_trys"),
        ("{class_name: gsm8k}, {class_name: gsm8k}", "two interactions are named 'gsm8k'"),
    ]:
        path.write_text(f"interaction: [{entry}]\n")
        with pytest.raises(ConfigError, match=why):
            load_interactions(path)
    for text, why in [("a: [", "no valid YAML|not valid YAML"), ("a: 1", "no list `interaction`")]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=why):
            load_interactions(path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_interactions(tmp_path / "missing.yaml")
