"""An episode arrives from a worker as it was, whatever a model or a user's code wrote into it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings

from agentloop.columns import Logprobs, LossMask, TokenIds, Versions
from agentloop.images import ImageFile
from agentloop.types import Message, StopReason, Trajectory, Turn
from agentloop.worker.episodes import EpisodePacker, EpisodeUnpacker
from agentloop.worker.frames import LENGTH_BYTES
from agentloop.worker.messages import Finished, NewImage, ToMain, episode_frames
from tests.agentloop.any_trajectory import exact, trajectories

ROW = 7

decode: Callable[[memoryview], Any] = msgspec.msgpack.Decoder(ToMain).decode


class Sent:
    """Both ends of a connection, without one: the images of a row are expected."""

    def __init__(self) -> None:
        self.packer = EpisodePacker(ROW)
        self.unpacker = EpisodeUnpacker()
        self.unpacker.expect(ROW)
        self.sizes: list[int] = []

    def __call__(self, episode: list[Trajectory]) -> list[Trajectory]:
        for frame in episode_frames(3, ROW, episode, self.packer):
            self.sizes.append(len(frame))
            message = decode(memoryview(frame)[LENGTH_BYTES:])
            if isinstance(message, NewImage):
                self.unpacker.add_image(message.key, message.image)
        assert isinstance(message, Finished) and message.id == 3
        return self.unpacker.episode(message.key, message.parts, message.odd)


def as_columns(trajectory: Trajectory) -> Trajectory:
    kinds = {"token_ids": TokenIds, "loss_mask": LossMask, "logprobs": Logprobs, "versions": Versions}
    for name, kind in kinds.items():
        setattr(trajectory, name, kind(getattr(trajectory, name)))
    return trajectory


@given(trajectories())
@settings(max_examples=200, deadline=None)
def test_any_trajectory_arrives_to_the_bit(made: Trajectory) -> None:
    (arrived,) = Sent()([made])
    assert exact(arrived) == exact(as_columns(made))


def test_every_field_of_a_trajectory_is_sent() -> None:
    """A field that is added later is noticed here."""
    made = plain(tokens=3)
    for field in fields(Trajectory):
        value = getattr(made, field.name)
        if isinstance(value, str) and type(value) is str:
            setattr(made, field.name, f"the {field.name}")
        elif isinstance(value, int) and type(value) is int:
            setattr(made, field.name, 41)
    made.reward, made.outcome, made.answer, made.error, made.broken_rule = 0.5, 0.25, "42", "an error", "columns"
    made.reward_parts, made.metrics = {"a": 1.0}, {"b": 2.0}
    (arrived,) = Sent()([made])
    for field in fields(Trajectory):
        assert exact(getattr(arrived, field.name)) == exact(getattr(made, field.name)), field.name


def plain(tokens: int, messages: list[Message] | None = None) -> Trajectory:
    return Trajectory(
        TokenIds(range(tokens)),
        LossMask([0] + [1] * (tokens - 1)),
        Logprobs([None] + [-0.5] * (tokens - 1)),
        Versions([None] + [3] * (tokens - 1)),
        1,
        messages=messages or [],
    )


def test_values_of_user_code_become_what_a_trace_shows() -> None:
    class Own:
        def __str__(self) -> str:
            return "own text"

    made = plain(2)
    odd: Any = {"array": np.arange(3), "number": np.float32(0.5), "own": Own(), "pair": (1, 2)}
    made.messages = [{"role": "user", "content": odd}]
    made.metrics = {"numpy": np.float64(0.1), "count": np.int64(3)}  # type: ignore[dict-item]
    (arrived,) = Sent()([made])
    content: Any = arrived.messages[0]["content"]
    assert content == {"array": [0, 1, 2], "number": 0.5, "own": "own text", "pair": [1, 2]}
    assert arrived.metrics == {"numpy": 0.1, "count": 3}


def test_a_value_within_itself_does_not_lose_the_episode() -> None:
    made = plain(2)
    loop: list[Any] = []
    loop.append(loop)
    made.messages = [{"role": "user", "content": loop}]
    (arrived,) = Sent()([made])
    assert exact(arrived.token_ids) == exact(made.token_ids) and arrived.messages[0]["role"] == "user"


def test_an_image_is_sent_once_for_a_row_and_shown_in_all_places() -> None:
    image = ImageFile(b"picture" * 1000, 20, 10)
    part: Any = [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]

    def episode() -> list[Trajectory]:
        made = plain(2, [{"role": "user", "content": part}])
        made.images = [image]
        return [made]

    sent = Sent()
    (first,), (second,) = sent(episode()), sent(episode())
    assert first.images == [image] == second.images
    content: Any = second.messages[0]["content"]
    assert content[0]["image"] is second.images[0] is first.images[0]
    assert sum(size > 7000 for size in sent.sizes) == 1

    odd = episode()
    odd[0].answer = "a lone \ud800"
    (third,) = sent(odd)
    assert third.answer == "a lone \ud800" and third.images == [image]


def test_an_image_that_no_trajectory_lists_arrives_too() -> None:
    image = ImageFile(b"from a tool", 2, 2)
    (arrived,) = Sent()([plain(2, [{"role": "tool", "content": [{"type": "image", "image": image}]}])])
    content: Any = arrived.messages[0]["content"]
    assert content[0]["image"] == image


def test_columns_are_copied_once() -> None:
    """The main process allocates at most 1.3 times the bytes of the columns that arrive."""
    made = plain(200_000)
    sent = Sent()
    (frame,) = episode_frames(3, ROW, [made], sent.packer)
    view = memoryview(frame)[LENGTH_BYTES:]
    tracemalloc.start()
    try:
        message = decode(view)
        arrived = sent.unpacker.episode(message.key, message.parts, message.odd)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(arrived[0].token_ids) == 200_000
    assert peak < 1.3 * len(frame)


def test_a_field_that_cannot_be_there_is_named() -> None:
    made = plain(2)
    made.turns = [Turn(0, 1, None, StopReason.STOP)]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Expected `str`, got `None` - at `turns\[0\]\.text`"):
        Sent()([made])


def test_an_image_that_could_not_be_sent_is_tried_again() -> None:
    image = ImageFile(b"picture", 2, 2)
    made = plain(2)
    made.images = [image]
    packer = EpisodePacker(ROW)
    packer.new_images([made]).__next__()  # and the caller fails
    assert len(list(packer.new_images([made]))) == 1 and not list(packer.new_images([made]))
