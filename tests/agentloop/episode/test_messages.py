"""Messages of agents in the forms of other libraries: one form inside, or the agent's own mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agentloop.agent.base import AgentLoop
from agentloop.agent.runner import EpisodeRunner
from agentloop.config import SamplingConfig
from agentloop.episode.episode import Episode
from agentloop.episode.messages import plain_messages
from agentloop.types import EpisodeStatus, Task

TEXT: Any = {"role": "user", "content": "x"}
IMAGE: Any = {"type": "image", "image": b"png"}


def test_a_plain_message_is_the_same_object() -> None:
    messages: Any = [TEXT, {"role": "user", "content": [IMAGE]}]
    assert all(one is other for one, other in zip(plain_messages(messages), messages, strict=True))


@pytest.mark.parametrize(
    ("content", "plain"),
    [
        (None, ""),
        (["Look:", IMAGE], [{"type": "text", "text": "Look:"}, IMAGE]),
        ((IMAGE,), [IMAGE]),
    ],
)
def test_other_forms_become_plain(content: Any, plain: Any) -> None:
    message: Any = {"role": "assistant", "content": content, "tool_calls": []}
    assert plain_messages([message]) == [{**message, "content": plain}]
    assert message["content"] is content, "the agent's own object stays as it is"


CALL: Any = {"type": "function", "id": "c0", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("calls", "plain"),
    [
        ([{"name": "add", "arguments": {"a": 1}, "id": "c0"}], [CALL]),
        ((CALL,), [CALL]),
        ([{**CALL, "function": {"name": "now"}}], [{**CALL, "function": {"name": "now", "arguments": {}}}]),
        ([{"function": {"name": "f", "arguments": "{}"}}], [{"function": {"name": "f", "arguments": "{}"}}]),
    ],
)
def test_tool_calls_of_other_forms_become_plain(calls: Any, plain: Any) -> None:
    message: Any = {"role": "assistant", "content": "", "tool_calls": calls}
    assert plain_messages([message]) == [{**message, "tool_calls": plain}]
    assert message["tool_calls"] is calls, "the agent's own object stays as it is"
    for same in ({"role": "assistant", "content": "", "tool_calls": [CALL]}, TEXT):
        assert plain_messages([same])[0] is same


def test_a_dumped_message_without_tool_calls_has_none() -> None:
    dumped: Any = {"role": "assistant", "content": "x", "tool_calls": None}
    assert plain_messages([dumped]) == [{"role": "assistant", "content": "x"}]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("hello", "'hello' is not a message"),
        ({"content": "x"}, "is not a message"),
        ({"role": 3, "content": "x"}, "is not a message"),
        ({"role": "user", "content": 5}, "of role user has content of type int"),
        ({"role": "user", "content": {"type": "text"}}, "content of type dict"),
        ({"role": "user", "content": [IMAGE, None]}, "a part of type NoneType"),
        ({"role": "assistant", "content": "", "tool_calls": {"a": 1}}, "tool_calls of type dict"),
        ({"role": "assistant", "content": "", "tool_calls": ["f"]}, "a tool call without a name"),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}, "a tool call without a name"),
    ],
)
def test_what_is_not_a_message_is_named(message: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plain_messages([message])


async def test_all_ways_into_an_episode_give_plain_messages(
    make_runner: Callable[..., EpisodeRunner], turn: Callable[[str], list[int]]
) -> None:
    parts: Any = {"role": "user", "content": ["What is ", "3 * 4?"]}
    seen: list[Episode] = []

    class Foreign(AgentLoop):
        async def run(self, episode: Episode) -> None:
            seen.append(episode.fork([parts]))
            await episode.generate()
            episode.observe(parts)
            seen.append(episode)
            with pytest.raises(ValueError, match="is not a message"):
                episode.observe({"role": None, "content": ""})  # type: ignore[typeddict-item]

    task = Task("0", "tool_agent", [TEXT])
    found = await make_runner([turn("12<|im_end|>")], agents={"tool_agent": Foreign}).run(
        task, group_id="g", sample_index=0, sampling=SamplingConfig(max_new_tokens=50)
    )
    assert found[-1].status is EpisodeStatus.OK, found[-1].error
    messages = [message for episode in seen for message in episode.messages if message["role"] == "user"]
    assert [len(m["content"]) for m in messages] == [2, 1, 2]
    assert all(isinstance(part, dict) for m in messages[::2] for part in m["content"])
    seen[1].rewrite([parts])
    assert isinstance(seen[1].messages[0]["content"][0], dict)
