"""Messages between the main process and an agent worker.

    main -> worker   Start, Serve, Row, Run, Cancel, Forget, Granted
    worker -> main   Ready, Refused, NewImage, Finished, Failed, Status, Acquire, Release

A row is sent once for all of its episodes that run in the worker at the same time, under a key, and
forgotten after the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from agentloop.types import Trajectory
from agentloop.worker.episodes import EpisodePacker, PackedImage
from agentloop.worker.frames import LENGTH_BYTES, FrameError, check_length


class Message(msgspec.Struct, array_like=True, tag=True):
    """Base of the messages."""


class Start(Message):
    """Load tokenizer, agents, tools and reward; answered with `Ready` or `Refused`.

    Attributes:
        recipe: as `tasks.encode_recipe` packs it, secrets included.
        folder: of the recipe's file.
        model_path: local folder of the model.
        path: `sys.path` of the main process, in its order: a module that the recipe names is the
            same one in all processes.
        python_path: the variable PYTHONPATH there, for programs that tools start; None: not set.
    """

    recipe: bytes
    folder: str
    model_path: str
    path: list[str]
    python_path: str | None


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


class NewImage(Message):
    """An image that following episodes of a row name by its digest."""

    key: int
    image: PackedImage


class Finished(Message):
    """An episode has ended.

    Attributes:
        parts: its trajectories, the main one last: a `PackedTrajectory` each, which is decoded
            apart. User code may have put anything into it.
        odd: in place of `parts`, if a text or a number in them has no form in MessagePack: for each
            trajectory its JSON and the digests of its images.
    """

    id: int
    key: int
    parts: list[msgspec.Raw]
    odd: list[tuple[str, list[str]]] = []


class Failed(Message):
    """An episode has ended without trajectories that could be sent.

    Attributes:
        id: of the `Run` that it answers.
        error: why, in words.
        fatal: it could not run at all; as in the main process, this ends the run.
    """

    id: int
    error: dict[str, str | None]
    fatal: bool


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
ToMain = Ready | Refused | NewImage | Finished | Failed | Status | Acquire | Release

_ENCODER = msgspec.msgpack.Encoder()


def framed(message: Message, encoder: msgspec.msgpack.Encoder = _ENCODER) -> bytearray:
    """Return a message as a frame for `FrameProtocol.send`.

    Raises:
        FrameError: it is too long.
    """
    frame = bytearray(256)
    encoder.encode_into(message, frame, LENGTH_BYTES)
    check_length(len(frame) - LENGTH_BYTES)
    return frame


def episode_frames(number: int, key: int, episode: Sequence[Trajectory], packer: EpisodePacker) -> Iterator[bytearray]:
    """Yield a finished episode as frames; images that are new to the other end come first.

    Args:
        number: of the `Run` that it answers.
        key: of its row.

    Raises:
        FrameError: it is too long for a frame.
    """
    for image in packer.new_images(episode):
        yield framed(NewImage(key, image))
    try:
        finished = framed(Finished(number, key, [msgspec.Raw(packer.packed(part)) for part in episode]))
    except FrameError:
        raise
    except Exception:  # noqa: BLE001  # user code may have put anything into it
        # A text with a lone surrogate, an integer of more than 64 bits, a value within itself.
        finished = framed(Finished(number, key, [], [packer.odd(part) for part in episode]))
    yield finished


def worker_decoder() -> msgspec.msgpack.Decoder[Any]:
    """Return a decoder of what a worker receives."""
    return msgspec.msgpack.Decoder(ToWorker)
