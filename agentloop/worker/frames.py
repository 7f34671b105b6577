"""Frames over a socket: the length of a message, and the message.

The buffer that a socket is read into is used again, so a message is decoded from it while
`on_frame` runs, and nothing of it is copied but what the decoder keeps.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import cast

log = logging.getLogger(__name__)

LENGTH_BYTES = 4
BUFFER_BYTES = 2**18
LONGEST_FRAME = 2**30
"""A longer frame is not read: the other end is not what it should be."""


class FrameError(Exception):
    """A message is too long for a frame."""


def check_length(length: int) -> None:
    """Raise `FrameError` if a message has too many bytes for a frame."""
    if length > LONGEST_FRAME:
        raise FrameError(f"{length:,} bytes cannot be sent between processes, {LONGEST_FRAME:,} at most")


OnFrame = Callable[[memoryview], None]
OnLost = Callable[[], None]


class FrameProtocol(asyncio.BufferedProtocol):
    """Hands over each frame that arrives. Made on a running event loop.

    Args:
        on_frame: called with a frame, which is valid during the call only. What it raises ends the
            connection.
        on_lost: called once, when the connection has ended.
    """

    def __init__(self, on_frame: OnFrame, on_lost: OnLost) -> None:
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._begin = self._end = 0
        self._long: memoryview | None = None  # a frame that the buffer has no room for
        self._long_end = 0
        self._loop = asyncio.get_running_loop()
        self._unsent = bytearray()
        self._drained = asyncio.Event()
        self._drained.set()

    @classmethod
    async def connect(cls, sock: socket.socket, on_frame: OnFrame, on_lost: OnLost) -> FrameProtocol:
        """Return the protocol of a connected socket, which it owns."""
        loop = asyncio.get_running_loop()
        protocol = cls(on_frame, on_lost)
        sock.setblocking(False)
        if sock.family == socket.AF_UNIX:
            await loop.create_unix_connection(lambda: protocol, sock=sock)
        else:
            await loop.create_connection(lambda: protocol, sock=sock)
        return protocol

    def send(self, frame: bytearray) -> None:
        """Send a message that begins with `LENGTH_BYTES` free bytes; lost if the other end has
        closed. Small ones of one pass of the event loop are written together."""
        assert self._transport is not None
        frame[:LENGTH_BYTES] = (len(frame) - LENGTH_BYTES).to_bytes(LENGTH_BYTES)
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent += frame
        if len(self._unsent) > BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        assert self._transport is not None
        unsent, self._unsent = self._unsent, bytearray()
        if unsent and not self._transport.is_closing():
            self._transport.write(unsent)

    async def drain(self) -> None:
        """Wait until the other end has read most of what was sent, or the connection has ended."""
        await self._drained.wait()

    def close(self) -> None:
        """Close the connection once what was sent is on its way."""
        if self._transport is not None:
            self._flush()
            self._transport.close()

    def abort(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    # -- what the event loop calls -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass

    def connection_lost(self, exc: Exception | None) -> None:
        self._drained.set()
        self._on_lost()

    def pause_writing(self) -> None:
        self._drained.clear()

    def resume_writing(self) -> None:
        self._drained.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._long is not None:
            return self._long[self._long_end :]
        return self._buffer[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self._read(nbytes)
        except Exception:  # of a handler too: without this message, only a closed connection would be seen
            log.exception("a message could not be read; its connection is closed")
            self.abort()

    def _read(self, nbytes: int) -> None:
        if self._long is not None:
            self._long_end += nbytes
            if self._long_end == len(self._long):
                frame, self._long = self._long, None
                self._on_frame(frame)
            return

        self._end += nbytes
        while (unread := self._end - self._begin) >= LENGTH_BYTES:
            start = self._begin + LENGTH_BYTES
            length = int.from_bytes(self._buffer[self._begin : start])
            if length > LONGEST_FRAME:
                raise ValueError(f"a frame of {length:,} bytes: the other end is not an agent worker")
            if unread - LENGTH_BYTES >= length:
                self._begin = start + length
                self._on_frame(self._buffer[start : start + length])
            elif length + LENGTH_BYTES > len(self._buffer):
                self._long, self._long_end = memoryview(bytearray(length)), self._end - start
                self._long[: self._long_end] = self._buffer[start : self._end]
                self._begin = self._end
                break
            else:
                break
        self._compact()

    def _compact(self) -> None:
        """Move an unfinished frame to the beginning of the buffer."""
        rest = self._end - self._begin
        if self._begin:
            self._buffer[:rest] = bytes(self._buffer[self._begin : self._end])
            self._begin, self._end = 0, rest
