"""Messages arrive whole and in order, however the stream is cut."""

from __future__ import annotations

import asyncio
import socket

from hypothesis import given, settings
from hypothesis import strategies as st

from agentloop.worker.frames import BUFFER_BYTES, LENGTH_BYTES, LONGEST_FRAME, FrameProtocol


def fed(stream: bytes, cuts: list[int]) -> list[bytes]:
    """What a protocol hands over if it reads a stream in pieces."""
    found: list[bytes] = []
    protocol = FrameProtocol(lambda frame: found.append(bytes(frame)), lambda: None)
    position = 0
    for cut in [*cuts, len(stream)]:
        while position < min(cut, len(stream)):
            buffer = protocol.get_buffer(-1)
            assert len(buffer) > 0
            part = stream[position : min(cut, position + len(buffer))]
            buffer[: len(part)] = part
            protocol.buffer_updated(len(part))
            position += len(part)
    return found


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(LENGTH_BYTES) + message


@given(st.lists(st.binary(max_size=40), max_size=12), st.lists(st.integers(0, 500), max_size=10))
@settings(max_examples=300, deadline=None)
async def test_any_cut_of_the_stream(messages: list[bytes], cuts: list[int]) -> None:
    assert fed(b"".join(map(framed, messages)), sorted(cuts)) == messages


async def test_frames_around_the_size_of_the_buffer() -> None:
    sizes = [BUFFER_BYTES - 5, BUFFER_BYTES - 4, BUFFER_BYTES - 3, 3 * BUFFER_BYTES, 1, 0, BUFFER_BYTES]
    messages = [bytes([number]) * size for number, size in enumerate(sizes)]
    stream = b"".join(map(framed, messages))
    for step in (1000, BUFFER_BYTES - 1, BUFFER_BYTES, 10 * BUFFER_BYTES):
        assert fed(stream, list(range(step, len(stream), step))) == messages


async def connected() -> tuple[FrameProtocol, FrameProtocol, list[bytes], asyncio.Event]:
    ours, theirs = socket.socketpair()
    received: list[bytes] = []
    lost = asyncio.Event()

    def take(frame: memoryview) -> None:
        if bytes(frame) == b"wrong":
            raise ValueError("not a message")
        received.append(bytes(frame))

    reader = await FrameProtocol.connect(theirs, take, lost.set)
    writer = await FrameProtocol.connect(ours, lambda _: None, lambda: None)
    return writer, reader, received, lost


async def test_over_a_socket_with_a_reader_that_waits() -> None:
    writer, _reader, received, lost = await connected()
    sent = [bytes([number % 256]) * (number * 991 % 70_000) for number in range(300)]
    for message in sent:
        writer.send(bytearray(LENGTH_BYTES) + message)
        await writer.drain()
    writer.close()
    await lost.wait()
    assert received == sent
    writer.send(bytearray(LENGTH_BYTES) + b"too late")  # lost, and nothing is raised


async def test_what_is_not_a_message_ends_the_connection() -> None:
    writer, _, received, lost = await connected()
    writer.send(bytearray(LENGTH_BYTES) + b"good")
    writer.send(bytearray(LENGTH_BYTES) + b"wrong")
    await lost.wait()
    assert received == [b"good"]


async def test_a_frame_that_is_too_long_ends_the_connection() -> None:
    ours, theirs = socket.socketpair()
    lost = asyncio.Event()
    await FrameProtocol.connect(theirs, lambda _: None, lost.set)
    ours.sendall((LONGEST_FRAME + 1).to_bytes(LENGTH_BYTES) + b"rest")
    await lost.wait()
    ours.close()
