"""A finished episode on its way from an agent worker: columns as they are in memory, and the rest.

The main process makes one copy of the columns, from the buffer it reads into. What a user's code
wrote into a message and MessagePack has no form for becomes its text, as in a trace.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from agentloop.columns import Logprobs, LossMask, TokenIds, Versions
from agentloop.faults import Fault
from agentloop.images import ImageFile
from agentloop.trace.store.exact_json import dump, load, text_of
from agentloop.types import EpisodeStatus, Message, Span, StepReward, StopReason, Trajectory, Turn

Ext = msgspec.msgpack.Ext

IMAGE, IMAGE_FILE = 1, 2
"""Marks of an image: the key of its row and its digest; or all of one that no trajectory lists."""

KEY_BYTES = 8

VALUES = (
    "reward", "reward_parts", "outcome", "answer", "error", "broken_rule", "agent_name", "task_id", "group_id",
    "sample_index", "data_source", "metrics", "trace_id",
)  # fmt: skip
"""Fields of a trajectory that are sent as they are."""


class PackedImage(msgspec.Struct, array_like=True):
    """An image as a file."""

    data: bytes
    width: int
    height: int


class PackedTrajectory(msgspec.Struct, array_like=True):
    """The fields of a `Trajectory`.

    Attributes:
        token_ids, loss_mask, logprobs, version_ends, version_values: the columns, as they are
            stored.
        values: those named in `VALUES`, in that order.
    """

    token_ids: memoryview
    loss_mask: memoryview
    logprobs: memoryview
    version_ends: memoryview
    version_values: list[int | None]
    prompt_length: int
    turns: list[Turn]
    step_rewards: list[StepReward]
    faults: list[Fault]
    spans: list[Span]
    stop_reason: StopReason
    status: EpisodeStatus
    messages: list[Any]
    images: list[Any]
    values: list[Any]


class EpisodePacker:
    """Packs the episodes of one row.

    Args:
        key: of the row.
    """

    def __init__(self, key: int) -> None:
        self._key = key.to_bytes(KEY_BYTES)
        self._sent: set[str] = set()
        self._encode = msgspec.msgpack.Encoder(enc_hook=_plain).encode

    def new_images(self, trajectories: Sequence[Trajectory]) -> Iterator[PackedImage]:
        """Yield the images of an episode that no earlier one had; they have to be sent first."""
        for trajectory in trajectories:
            for image in trajectory.images:
                if isinstance(image, ImageFile) and image.digest not in self._sent:
                    yield PackedImage(image.data, image.width, image.height)
                    self._sent.add(image.digest)  # not if it could not be sent

    def packed(self, trajectory: Trajectory) -> bytes:
        """Return a trajectory as bytes.

        Raises:
            Exception: MessagePack has no form for what user code put into it.
        """
        return self._encode(self._pack(trajectory))

    def _pack(self, trajectory: Trajectory) -> PackedTrajectory:
        """Return a trajectory in a form that can be encoded; columns are not copied."""
        versions = _column(trajectory.versions, Versions)
        return PackedTrajectory(
            token_ids=_column(trajectory.token_ids, TokenIds).view(),
            loss_mask=_column(trajectory.loss_mask, LossMask).view(),
            logprobs=_column(trajectory.logprobs, Logprobs).view(),
            version_ends=versions.view(),
            version_values=versions.values,
            prompt_length=trajectory.prompt_length,
            turns=trajectory.turns,
            step_rewards=trajectory.step_rewards,
            faults=trajectory.faults,
            spans=trajectory.spans,
            stop_reason=trajectory.stop_reason,
            status=trajectory.status,
            messages=[self._message(message) for message in trajectory.messages],
            images=[self._shown(image) for image in trajectory.images],
            values=[getattr(trajectory, name) for name in VALUES],
        )

    def odd(self, trajectory: Trajectory) -> tuple[str, list[str]]:
        """Return a trajectory whose texts or numbers MessagePack does not take, as JSON, and the
        digests of its images."""
        digests = [image.digest for image in trajectory.images if isinstance(image, ImageFile)]
        return dump(trajectory.to_json()), digests

    def _message(self, message: Message) -> Any:
        """Return a message with marks in place of its images."""
        content: Any = message["content"]
        if type(content) is not list:
            return message
        parts = [
            {key: self._shown(value) for key, value in part.items()} if type(part) is dict else part for part in content
        ]
        return {**message, "content": parts}

    def _shown(self, value: Any) -> Any:
        """Return the mark of an image; any other value is the same."""
        if not isinstance(value, ImageFile):
            return value
        if value.digest in self._sent:
            return Ext(IMAGE, self._key + value.digest.encode())
        return Ext(IMAGE_FILE, self._encode(PackedImage(value.data, value.width, value.height)))


def _plain(value: Any) -> Any:
    """Return what stands for a value that MessagePack does not know, as in a trace."""
    if hasattr(value, "tolist"):  # a numpy array or number
        return value.tolist()
    return text_of(value)


class EpisodeUnpacker:
    """Unpacks the episodes of one connection.

    Attributes:
        images: by key of a row, its images by digest.
    """

    def __init__(self) -> None:
        self.images: dict[int, dict[str, ImageFile]] = {}
        self._decode = msgspec.msgpack.Decoder(PackedTrajectory, ext_hook=self._unmark).decode

    def expect(self, key: int) -> None:
        """Keep the images of a row, until `forget`."""
        self.images[key] = {}

    def add_image(self, key: int, packed: PackedImage) -> None:
        """Keep an image of a row, if its episodes are still waited for."""
        if (known := self.images.get(key)) is not None:
            image = _image_file(packed)
            known[image.digest] = image

    def forget(self, key: int) -> None:
        """Drop the images of a row."""
        self.images.pop(key, None)

    def episode(self, key: int, parts: Sequence[msgspec.Raw], odd: Sequence[tuple[str, list[str]]]) -> list[Trajectory]:
        """Return the trajectories of an episode; arguments as in `messages.Finished`.

        Raises:
            ValueError: user code has put into a field what cannot be there.
            TokenLawError: into a column.
        """
        try:
            packed = [self._decode(part) for part in parts]
        except msgspec.ValidationError as exc:
            raise ValueError(_PLACE.sub(lambda found: _FIELDS[int(found[1])], str(exc))) from exc
        return [unpack(part) for part in packed] + [self._odd(key, *one) for one in odd]

    def _unmark(self, code: int, content: memoryview) -> Any:
        if code == IMAGE:
            return self.images[int.from_bytes(content[:KEY_BYTES])][bytes(content[KEY_BYTES:]).decode()]
        if code == IMAGE_FILE:
            return _image_file(msgspec.msgpack.decode(content, type=PackedImage))
        raise ValueError(f"mark {code} is unknown")

    def _odd(self, key: int, text: str, digests: Sequence[str]) -> Trajectory:
        """Return the trajectory of `EpisodePacker.odd`.

        Raises:
            TokenLawError: a column holds what no column can.
        """
        trajectory = Trajectory.from_json(load(text))
        trajectory.images = [self.images[key][digest] for digest in digests]
        return trajectory


_PLACE = re.compile(r"\$\[(\d+)\]")
_FIELDS = PackedTrajectory.__struct_fields__


def unpack(packed: PackedTrajectory) -> Trajectory:
    """Return a trajectory with columns of its own."""
    return Trajectory(
        token_ids=TokenIds.from_bytes(packed.token_ids),
        loss_mask=LossMask.from_bytes(packed.loss_mask),
        logprobs=Logprobs.from_bytes(packed.logprobs),
        versions=Versions.from_ends(packed.version_ends, packed.version_values),
        prompt_length=packed.prompt_length,
        turns=packed.turns,
        step_rewards=packed.step_rewards,
        faults=packed.faults,
        spans=packed.spans,
        stop_reason=packed.stop_reason,
        status=packed.status,
        messages=packed.messages,
        images=packed.images,
        **_named(packed.values),
    )


def _named(values: Sequence[Any]) -> Mapping[str, Any]:
    return dict(zip(VALUES, values, strict=True))


def _column(column: Any, kind: Any) -> Any:
    return column if type(column) is kind else kind(column)


def _image_file(packed: PackedImage) -> ImageFile:
    return ImageFile(packed.data, packed.width, packed.height)
