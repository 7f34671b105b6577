"""Messages between the main process and a rank: JSON and raw numpy buffers over a socket pair.

    uint32 length of the header | header (JSON) | the buffers, concatenated

The header's `arrays` gives dtype and shape of each buffer. Nothing is pickled, and no buffer is
copied twice.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import orjson

from trainer.types import Sample, TrainSample, ValueSample

_LENGTH = struct.Struct("<I")
HEADER_LENGTH_BYTES = _LENGTH.size

Message = tuple[Any, list[np.ndarray]]
"""A JSON body, and the arrays that belong to it."""

S = TypeVar("S", TrainSample, ValueSample)


def encode(body: Any, arrays: Sequence[np.ndarray] = ()) -> list[bytes]:
    """Return the bytes of one message, in chunks. `body` may hold dataclasses."""
    arrays = [np.ascontiguousarray(array) for array in arrays]
    described = [{"dtype": array.dtype.str, "shape": array.shape} for array in arrays]
    header = orjson.dumps({"body": body, "arrays": described})
    return [_LENGTH.pack(len(header)) + header, *(array.tobytes() for array in arrays)]


def header_length(data: bytes | bytearray) -> int:
    return int(_LENGTH.unpack(data)[0])


def decode_header(data: bytes | bytearray) -> tuple[Any, list[tuple[np.dtype[Any], tuple[int, ...]]]]:
    """Return the body, and dtype and shape of each array that follows."""
    header = orjson.loads(data)
    return header["body"], [(np.dtype(entry["dtype"]), tuple(entry["shape"])) for entry in header["arrays"]]


def array_bytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))


class BlockingChannel:
    """The rank's end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def receive(self) -> Message | None:
        """Return the next message, or None if the other end has closed."""
        try:
            body, described = decode_header(self._read(header_length(self._read(HEADER_LENGTH_BYTES))))
            arrays = [
                np.frombuffer(self._read(array_bytes(dtype, shape)), dtype=dtype).reshape(shape)
                for dtype, shape in described
            ]
        except (EOFError, ConnectionError):
            return None
        return body, arrays

    def send(self, body: Any, arrays: Sequence[np.ndarray] = ()) -> None:
        """Send a message; nobody reads it if the other end has closed."""
        chunks = encode(body, arrays)
        with contextlib.suppress(ConnectionError):
            for chunk in chunks:
                self._sock.sendall(chunk)

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._sock.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return data


# -- samples ---------------------------------------------------------------------------------------


def samples_to_arrays(samples: Sequence[Sample], kind: type[Sample] = TrainSample) -> list[np.ndarray]:
    """Flatten samples into arrays: token columns joined, scalars by sample, and each image once.

    An optional column is sent if all samples have it, and is empty otherwise.

    Args:
        kind: class of the samples, for the names of its columns.
    """

    def joined(name: str, dtype: type) -> np.ndarray:
        parts: list[np.ndarray] = [np.asarray(getattr(sample, name), dtype=dtype) for sample in samples]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)

    def optional(name: str) -> np.ndarray:
        complete = all(getattr(sample, name) is not None for sample in samples)
        return joined(name, np.float32) if complete else np.zeros(0, dtype=np.float32)

    # Samples of a group share their images: compare them by identity, which is cheap, and send each
    # once.
    images = {id(image): image for sample in samples for image in sample.images}
    numbers = {key: number for number, key in enumerate(images)}

    return [
        joined("token_ids", np.int32),
        joined("loss_mask", np.bool_),
        np.array([len(sample) for sample in samples], dtype=np.int64),
        np.array([[sample.prompt_length, sample.group_key] for sample in samples], dtype=np.int64).reshape(-1, 2),
        np.array([sample.weight for sample in samples], dtype=np.float64),
        np.concatenate([np.zeros(0, dtype=np.uint8), *images.values()]),
        np.array([len(image) for image in images.values()], dtype=np.int64),
        np.array([len(sample.images) for sample in samples], dtype=np.int64),
        np.array([numbers[id(image)] for sample in samples for image in sample.images], dtype=np.int64),
        *(joined(name, np.float32) for name in kind.COLUMNS),
        *(optional(name) for name in kind.OPTIONAL_COLUMNS),
    ]


def arrays_to_samples(arrays: Sequence[np.ndarray], kind: type[S]) -> list[S]:
    """Invert `samples_to_arrays`. The samples are views of the arrays."""
    token_ids, loss_mask, lengths, numbers, weights, blob, image_lengths, image_counts, image_numbers, *rest = arrays
    if not len(lengths):
        return []

    ends = np.cumsum(lengths)[:-1]
    protocol: type[Sample] = kind
    names = (*protocol.COLUMNS, *protocol.OPTIONAL_COLUMNS)
    columns: dict[str, Sequence[Any]] = {
        name: np.split(column, ends) if len(column) or name in protocol.COLUMNS else [None] * len(lengths)
        for name, column in zip(names, rest, strict=True)
    }
    images = np.split(blob, np.cumsum(image_lengths)[:-1]) if len(image_lengths) else []
    images_of = np.split(image_numbers, np.cumsum(image_counts)[:-1])

    rows = zip(
        np.split(token_ids, ends), np.split(loss_mask, ends), numbers.tolist(), weights.tolist(), images_of, strict=True
    )
    return [
        kind(
            token_ids=ids,
            loss_mask=mask,
            prompt_length=prompt_length,
            group_key=group_key,
            weight=weight,
            images=tuple(images[number] for number in numbers_of),
            **{name: parts[index] for name, parts in columns.items()},
        )
        for index, (ids, mask, (prompt_length, group_key), weight, numbers_of) in enumerate(rows)
    ]
