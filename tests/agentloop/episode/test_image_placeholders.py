"""Placeholders of images: counted at each turn before the engine is asked, and never trained."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from agentloop.agent.base import AgentLoop
from agentloop.agent.runner import EpisodeRunner
from agentloop.chat import ChatRenderer, load_tokenizer
from agentloop.chat.images import ImageTokens
from agentloop.config import SamplingConfig
from agentloop.episode.episode import Episode
from agentloop.episode.law import check_images
from agentloop.errors import LawRule, TokenLawError
from agentloop.testing import FakeGenerator
from agentloop.types import EpisodeStatus, Message, Task, Trajectory

TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}[<|image_pad|>]{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def seeing(quickstart_model: Path) -> ChatRenderer:
    """A renderer whose template shows images in every role, each of as many tokens as its height."""
    tokenizer = load_tokenizer(str(quickstart_model))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>"]})
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return ChatRenderer(tokenizer, chat_template=TEMPLATE, images=ImageTokens(pad, lambda height, width: height))


def shown(height: int) -> Message:
    buffer = io.BytesIO()
    Image.new("RGB", (3, height), "white").save(buffer, "PNG")
    return {"role": "user", "content": [{"type": "image", "image": buffer.getvalue()}, {"type": "text", "text": "?"}]}


class Looking(AgentLoop):
    """Shows an image in the second turn."""

    async def run(self, episode: Episode) -> None:
        await episode.generate()
        episode.observe(shown(2))
        await episode.generate()


class Tampering(AgentLoop):
    """Loses an image of its conversation: an agent can, as the list is its own."""

    async def run(self, episode: Episode) -> None:
        await episode.generate()
        episode._branch.images.clear()
        episode.observe({"role": "user", "content": "And now?"})
        await episode.generate()


def of(
    make_runner: Callable[..., EpisodeRunner], seeing: ChatRenderer, loop: type[AgentLoop], *turns: list[int]
) -> tuple[EpisodeRunner, FakeGenerator]:
    generator = FakeGenerator([*map(list, turns)], stop_ids=frozenset({seeing.end_of_turn}))
    return make_runner(generator, renderer=seeing, agents={"tool_agent": loop}), generator


async def run(runner: EpisodeRunner, *prompt: Message) -> Trajectory:
    task = Task(task_id="7", agent_name="tool_agent", prompt=list(prompt))
    (trajectory,) = await runner.run(task, group_id="0", sample_index=0, sampling=SamplingConfig())
    return trajectory


async def test_each_image_has_its_run_of_placeholders(
    make_runner: Callable[..., EpisodeRunner], seeing: ChatRenderer
) -> None:
    runner, generator = of(make_runner, seeing, Looking, [1, 2, seeing.end_of_turn], [3, seeing.end_of_turn])
    trajectory = await run(runner, shown(3), shown(4))
    assert trajectory.status is EpisodeStatus.OK, trajectory.error
    assert [ids.count(seeing.image_token) for ids in generator.prompts] == [7, 9]
    assert [len(images) for images in generator.images] == [2, 3]


async def test_a_sampled_placeholder_rejects_its_episode(
    make_runner: Callable[..., EpisodeRunner], seeing: ChatRenderer
) -> None:
    runner, _ = of(make_runner, seeing, Looking, [1, 2, seeing.end_of_turn], [3, seeing.image_token, 4])
    trajectory = await run(runner, shown(3))
    assert trajectory.status is EpisodeStatus.REJECTED
    assert trajectory.broken_rule == LawRule.IMAGES.value
    assert "was sampled" in str(trajectory.error)


async def test_placeholders_that_were_sampled_earlier_stop_the_next_turn(
    make_runner: Callable[..., EpisodeRunner], seeing: ChatRenderer
) -> None:
    runner, generator = of(make_runner, seeing, Looking, [1, seeing.image_token, 2], [3, seeing.end_of_turn])
    trajectory = await run(runner, shown(3))
    assert trajectory.status is EpisodeStatus.REJECTED
    assert len(generator.prompts) == 1, "the engine was not asked again"


async def test_an_image_that_was_lost_is_found_before_the_engine_is_asked(
    make_runner: Callable[..., EpisodeRunner], seeing: ChatRenderer
) -> None:
    runner, generator = of(make_runner, seeing, Tampering, [1, seeing.end_of_turn], [3, seeing.end_of_turn])
    trajectory = await run(runner, shown(3))
    assert trajectory.status is EpisodeStatus.REJECTED
    assert trajectory.broken_rule == LawRule.IMAGES.value
    assert "0 images have 1 runs" in str(trajectory.error)
    assert len(generator.prompts) == 1


@pytest.mark.parametrize(
    ("ids", "images", "fits"),
    [
        ([1, 9, 9, 2], 1, True),
        ([9, 9, 2, 9], 2, True),
        ([9], 1, True),
        ([1, 2], 0, True),
        ([1, 9, 2], 0, False),
        ([1, 2], 1, False),
        ([9, 9], 2, False),
    ],
)
def test_runs_are_counted_at_the_edges_too(ids: list[int], images: int, fits: bool) -> None:
    n = len(ids)
    trajectory = Trajectory(ids, [0] * n, [None] * n, [None] * n, n, images=[object()] * images)
    if fits:
        check_images(trajectory, 9)
    else:
        with pytest.raises(TokenLawError) as caught:
            check_images(trajectory, 9)
        assert caught.value.rule is LawRule.IMAGES
