"""Messages between the run's main process and a rank: a JSON header and raw numpy buffers over a socket pair.

    uint32 length of the header | header (JSON) | the buffers one after the other

The header's `arrays` says dtype and shape of each buffer, so that nothing is pickled and nothing is copied twice.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from trainer.types import TrainSample

_LENGTH = struct.Struct("<I")
HEADER_LENGTH_BYTES = _LENGTH.size

Message = tuple[dict[str, Any], list[np.ndarray]]


def encode(body: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> list[bytes]:
    """The bytes of one message, in pieces."""
    arrays = [np.ascontiguousarray(array) for array in arrays]
    described = [{"dtype": array.dtype.str, "shape": array.shape} for array in arrays]
    header = orjson.dumps({"body": body, "arrays": described})
    return [_LENGTH.pack(len(header)) + header, *(array.tobytes() for array in arrays)]


def header_length(data: bytes) -> int:
    return int(_LENGTH.unpack(data)[0])


def decode_header(data: bytes) -> tuple[dict[str, Any], list[tuple[np.dtype, tuple[int, ...]]]]:
    """The body, and dtype and shape of each array that follows."""
    header = orjson.loads(data)
    return header["body"], [(np.dtype(entry["dtype"]), tuple(entry["shape"])) for entry in header["arrays"]]


def array_bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))


class BlockingChannel:
    """The rank's end."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def receive(self) -> Message | None:
        """The next message, or None when the other end is gone."""
        try:
            body, described = decode_header(self._read(header_length(self._read(HEADER_LENGTH_BYTES))))
            arrays = [
                np.frombuffer(self._read(array_bytes(dtype, shape)), dtype=dtype).reshape(shape)
                for dtype, shape in described
            ]
        except EOFError:
            return None
        return body, arrays

    def send(self, body: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        for piece in encode(body, arrays):
            self._sock.sendall(piece)

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._sock.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return data


def samples_to_arrays(samples: Sequence[TrainSample]) -> list[np.ndarray]:
    """Samples as flat arrays: the ragged columns joined, numbers per sample, and each image once.

    `proximal_logprobs` are empty unless all samples have them.
    """
    proximal = bool(samples) and all(sample.proximal_logprobs is not None for sample in samples)

    def joined(name: str, dtype: type) -> np.ndarray:
        parts = [np.asarray(getattr(sample, name), dtype=dtype) for sample in samples]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)

    images = {id(image): image for sample in samples for image in sample.images}
    numbers = {key: number for number, key in enumerate(images)}
    return [
        joined("token_ids", np.int64),
        joined("loss_mask", np.bool_),
        joined("old_logprobs", np.float32),
        joined("advantages", np.float32),
        np.array([len(sample) for sample in samples], dtype=np.int64),
        np.array([[sample.prompt_length, sample.group_key] for sample in samples], dtype=np.int64).reshape(-1, 2),
        np.array([sample.weight for sample in samples], dtype=np.float64),
        joined("proximal_logprobs", np.float32) if proximal else np.zeros(0, dtype=np.float32),
        np.concatenate([np.zeros(0, dtype=np.uint8), *images.values()]),
        np.array([len(image) for image in images.values()], dtype=np.int64),
        np.array([len(sample.images) for sample in samples], dtype=np.int64),
        np.array([numbers[id(image)] for sample in samples for image in sample.images], dtype=np.int64),
    ]


def arrays_to_samples(arrays: Sequence[np.ndarray]) -> list[TrainSample]:
    """The inverse of `samples_to_arrays`; the samples are views of the arrays."""
    *arrays, blob, image_lengths, image_counts, image_numbers = arrays
    token_ids, loss_mask, old_logprobs, advantages, lengths, numbers, weights, proximal = arrays
    images = np.split(blob, np.cumsum(image_lengths)[:-1]) if len(image_lengths) else []
    of_samples = np.split(image_numbers, np.cumsum(image_counts)[:-1])
    cuts = np.cumsum(lengths)[:-1]
    columns = [np.split(column, cuts) for column in (token_ids, loss_mask, old_logprobs, advantages)]
    own = np.split(proximal, cuts) if len(proximal) else [None] * len(lengths)
    rows = zip(*columns, numbers.tolist(), weights.tolist(), own, of_samples, strict=True) if len(lengths) else ()
    return [
        TrainSample(
            ids,
            mask,
            old,
            advantage,
            prompt_length,
            group_key,
            weight,
            proximal_logprobs=proximal_logprobs,
            images=tuple(images[number] for number in of_sample),
        )
        for ids, mask, old, advantage, (prompt_length, group_key), weight, proximal_logprobs, of_sample in rows
    ]
