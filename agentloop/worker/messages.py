"""Messages between the main process and an agent worker.

    main -> worker   Start, Serve, Row, Run, Cancel, Forget, Granted
    worker -> main   Ready, Refused, NewImages, Finished, Status, Acquire, Release

A row is sent once for all of its episodes that run in the worker at the same time, under a key, and
forgotten after the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from agentloop.errors import TokenLawError
from agentloop.types import Trajectory
from agentloop.worker.episodes import EpisodePacker, PackedImage, PackedTrajectory
from agentloop.worker.frames import LENGTH_BYTES


class Message(msgspec.Struct, array_like=True, tag=True):
    """Base of the messages."""


class Start(Message):
    """Load tokenizer, agents, tools and reward; answered with `Ready` or `Refused`.

    Attributes:
        recipe: JSON of the recipe, secrets included.
        folder: of the recipe's file.
        model_path: local folder of the model.
        path: further entries of `sys.path`, for modules that the recipe names.
    """

    recipe: str
    folder: str
    model_path: str
    path: list[str]


class Serve(Message):
    """Run episodes on the server at `url` from now on.

    Attributes:
        max_in_flight: requests that may be in flight at once.
    """

    url: str
    token: str | None
    context_length: int
    max_in_flight: int


class Row(Message):
    """A row, as `tasks.encode_task` packs it."""

    key: int
    task: bytes


class Forget(Message):
    """No further episode of this row follows."""

    key: int


class Run(Message):
    """Run an episode; answered with `Finished`, unless it is cancelled.

    Attributes:
        key: of its row.
        sampling: JSON of a `SamplingConfig`.
    """

    id: int
    key: int
    group_id: str
    sample_index: int
    sampling: str
    seed: int | None


class Cancel(Message):
    """Cancel an episode; its tools are closed, and nothing is answered."""

    id: int


class Granted(Message):
    """A request for a turn (`Acquire`) has its turn now."""

    id: int


class Ready(Message):
    """Everything is loaded."""


class Refused(Message):
    """Something cannot be loaded: an error as `errors.error_to_json` describes it."""

    error: dict[str, str | None]


class NewImages(Message):
    """Images that following episodes of a row name by their digest."""

    key: int
    images: list[PackedImage]


class Finished(Message):
    """An episode has ended.

    Attributes:
        parts: its trajectories, the main one last.
        odd: in place of `parts`, if a text or a number in them has no form in MessagePack: for each
            trajectory its JSON and the digests of its images.
    """

    id: int
    key: int
    parts: list[PackedTrajectory]
    odd: list[tuple[str, list[str]]] = []


class Status(Message):
    """Sent every second: the worker's event loop runs.

    Attributes:
        lag_max_s: how late its event loop was at most since the last.
        culprits: what blocked it, as texts for a warning; each is sent once.
    """

    lag_max_s: float
    culprits: list[str]


class Acquire(Message):
    """Wait for a turn of a limit that all workers share; answered with `Granted`.

    Attributes:
        name, rate, concurrent: of the limit, as of `runtime.rate_limit.RateLimit`.
        caller: the episode, for fairness.
    """

    id: int
    name: str
    rate: float | None
    concurrent: int
    caller: str


class Release(Message):
    """A turn has ended, or is not waited for any longer."""

    id: int


ToWorker = Start | Serve | Row | Forget | Run | Cancel | Granted
ToMain = Ready | Refused | NewImages | Finished | Status | Acquire | Release

_ENCODER = msgspec.msgpack.Encoder()


def framed(message: Message, encoder: msgspec.msgpack.Encoder = _ENCODER) -> bytearray:
    """Return a message as a frame for `FrameProtocol.send`."""
    frame = bytearray(256)
    encoder.encode_into(message, frame, LENGTH_BYTES)
    return frame


def episode_frames(number: int, key: int, episode: Sequence[Trajectory], packer: EpisodePacker) -> list[bytearray]:
    """Return a finished episode as frames; images that are new to the other end come first.

    Args:
        number: of the `Run` that it answers.
        key: of its row.
    """
    frames = []
    if images := packer.new_images(episode):
        frames.append(framed(NewImages(key, images)))
    try:
        frames.append(framed(Finished(number, key, [packer.pack(part) for part in episode]), packer.encoder))
    except (ValueError, TypeError, OverflowError, RecursionError, TokenLawError):
        # A text with a lone surrogate, an integer of more than 64 bits, a value within itself.
        frames.append(framed(Finished(number, key, [], [packer.odd(part) for part in episode])))
    return frames


def worker_decoder() -> msgspec.msgpack.Decoder[Any]:
    """Return a decoder of what a worker receives."""
    return msgspec.msgpack.Decoder(ToWorker)
