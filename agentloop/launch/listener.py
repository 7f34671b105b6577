"""Where processes that this one did not start itself connect to it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, Self

from agentloop.launch.handshake import (
    CODE_BYTES,
    HEAD_BYTES,
    NONCE_BYTES,
    TIME_LIMIT_S,
    Identity,
    code,
    keep_alive,
    read_hello,
    rest_bytes,
    same,
)

MOST_AT_ONCE = 256
"""Handshakes at once; a further connection is closed, and a process of ours tries again."""


@dataclass(eq=False)
class Expected:
    """A process that will connect.

    Attributes:
        key: what proves that it is this process; for its environment.
        connection: the socket, once it has.
    """

    identity: Identity
    key: bytes
    connection: asyncio.Future[socket.socket]


class Listener:
    """Accepts each process that is expected, once; everybody else gets nothing.

    Attributes:
        host, port: where it listens.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.host, self.port = sock.getsockname()[:2]
        self._sock = sock
        self._secret = secrets.token_bytes(32)
        self._epochs: dict[str, int] = {}
        self._expected: dict[str, Expected] = {}
        self._greeting: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.create_task(self._accept(), name="listener of the run's processes")

    @classmethod
    def open(cls, host: str = "127.0.0.1") -> Self:
        """Listen at an address of this machine, on a free port."""
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            sock.bind((host, 0))
            sock.listen(MOST_AT_ONCE)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    def expect(self, name: str) -> Expected:
        """Expect the next start of a process. Earlier starts of that name are refused from now."""
        epoch = self._epochs[name] = self._epochs.get(name, 0) + 1
        identity = Identity(name, epoch)
        self.forget(name)
        connection: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        expected = self._expected[name] = Expected(identity, identity.key(self._secret), connection)
        return expected

    def forget(self, name: str) -> None:
        """Refuse the process of that name."""
        if (expected := self._expected.pop(name, None)) is not None:
            expected.connection.cancel()

    async def close(self) -> None:
        """Close the port. Connections that were handed over stay open."""
        for task in (self._accepting, *self._greeting):
            task.cancel()
        await asyncio.gather(self._accepting, *self._greeting, return_exceptions=True)
        self._sock.close()
        for name in list(self._expected):
            self.forget(name)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._sock)
            except OSError:  # out of file descriptors, or the peer has gone
                await asyncio.sleep(0.1)
                continue
            if len(self._greeting) >= MOST_AT_ONCE:
                sock.close()
                continue
            task = asyncio.create_task(self._greet(sock), name="handshake")
            self._greeting.add(task)
            task.add_done_callback(self._greeting.discard)

    async def _greet(self, sock: socket.socket) -> None:
        """Hand a connection over if it is that of an expected process, else close it."""
        taken = False
        try:
            sock.setblocking(False)
            async with asyncio.timeout(TIME_LIMIT_S):
                taken = await self._proven(sock)
        except (OSError, ValueError, EOFError, TimeoutError):
            pass
        finally:
            if not taken:
                sock.close()

    async def _proven(self, sock: socket.socket) -> bool:
        loop = asyncio.get_running_loop()
        head = await _receive(sock, HEAD_BYTES)
        rest = await _receive(sock, rest_bytes(head))
        identity = read_hello(head, rest)
        nonce = secrets.token_bytes(NONCE_BYTES)
        await loop.sock_sendall(sock, nonce)
        given = await _receive(sock, CODE_BYTES)

        # Who is not expected is refused at the same place as who does not know the key.
        said = head + rest + nonce
        expected = self._expected.get(identity.name)
        known = expected is not None and expected.identity == identity
        key = expected.key if expected is not None and known else secrets.token_bytes(CODE_BYTES)
        if not same(given, code(key, b"process", said)) or expected is None or not known:
            return False
        if expected.connection.done():
            return False
        del self._expected[identity.name]
        try:
            await loop.sock_sendall(sock, code(key, b"main", said))
            with contextlib.suppress(OSError):
                keep_alive(sock)
        except BaseException:
            expected.connection.cancel()
            raise
        if expected.connection.done():  # given up meanwhile
            return False
        expected.connection.set_result(sock)
        return True


async def connected(expected: Expected, ended: Awaitable[int], timeout_s: float) -> socket.socket | None:
    """Wait until a process has connected; None if it has ended before, or takes too long.

    Args:
        ended: returns when the process ends.
    """
    end = asyncio.ensure_future(ended)
    waiting: list[asyncio.Future[Any]] = [expected.connection, end]
    try:
        await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return expected.connection.result() if expected.connection.done() else None
    finally:
        end.cancel()
        expected.connection.cancel()


async def _receive(sock: socket.socket, size: int) -> bytes:
    """Return exactly `size` bytes, and leave what follows them unread.

    Raises:
        EOFError: the other end has closed.
    """
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size:
        if not (more := await loop.sock_recv(sock, size - len(data))):
            raise EOFError
        data += more
    return data
