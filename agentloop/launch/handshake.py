"""The first bytes of a connection between the main process and one that it did not start itself.

    process -> main   magic | length and name of the process | its epoch | 32 random bytes
    main -> process   32 random bytes
    process -> main   HMAC-SHA256 of all of the above
    main -> process   HMAC-SHA256 of the same, for the other direction

The key is made of the run's secret, the name and the epoch, so that a process can pass for itself
only. Nothing else is sent before both have checked the other's code; who does not know the key gets
32 random bytes. What follows is neither encrypted nor signed: the network between the machines of a
run is trusted (docs/cluster.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
from dataclasses import dataclass

from agentloop.errors import WorkerError

MAGIC = b"agloop1\n"
NONCE_BYTES = 32
CODE_BYTES = hashlib.sha256().digest_size
LONGEST_NAME = 64

_NUMBERS = struct.Struct("!BQ")
"""Length of the name, and the epoch."""

HEAD_BYTES = len(MAGIC) + _NUMBERS.size

TIME_LIMIT_S = 10.0
"""For the whole handshake."""

ALIVE_S, PROBES = 10, 6
"""A connection ends when the other machine has not answered `PROBES` probes, `ALIVE_S` seconds
apart. It outlives a cut of half a minute in the network."""


@dataclass(frozen=True)
class Identity:
    """Who connects: a process by name, and its start by epoch, from 1."""

    name: str
    epoch: int

    def __bytes__(self) -> bytes:
        name = self.name.encode()
        if not 0 < len(name) <= LONGEST_NAME:
            raise ValueError(f"a name of {len(name)} bytes")
        return _NUMBERS.pack(len(name), self.epoch) + name

    def key(self, secret: bytes) -> bytes:
        """Return the key of this process in the run with that secret."""
        return hmac.digest(secret, b"key" + bytes(self), "sha256")


def hello(identity: Identity, nonce: bytes) -> bytes:
    """Return the first message of a process."""
    return MAGIC + bytes(identity) + nonce


def rest_bytes(head: bytes) -> int:
    """Return how many bytes of the first message follow its first `HEAD_BYTES`.

    Raises:
        ValueError: it is not such a message.
    """
    if not head.startswith(MAGIC):
        raise ValueError("not a process of this project")
    length = _NUMBERS.unpack(head[len(MAGIC) :])[0]
    if not 0 < length <= LONGEST_NAME:
        raise ValueError(f"a name of {length} bytes")
    return int(length) + NONCE_BYTES


def read_hello(head: bytes, rest: bytes) -> Identity:
    """Return who sends the first message.

    Raises:
        ValueError: the name is not text.
    """
    return Identity(rest[:-NONCE_BYTES].decode(), int(_NUMBERS.unpack(head[len(MAGIC) :])[1]))


def code(key: bytes, sender: bytes, said: bytes) -> bytes:
    """Return the proof of `sender` (b"process" or b"main") for what both have sent before."""
    return hmac.digest(key, sender + b"\0" + said, "sha256")


def same(one: bytes, other: bytes) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(one, other)


def greet(sock: socket.socket, identity: Identity, key: bytes) -> None:
    """Prove the process's identity to the main process, and check that it is the main process.

    Raises:
        WorkerError: it refuses, or is not the one that has the key.
        OSError: the connection failed, or took too long.
    """
    sock.settimeout(TIME_LIMIT_S)
    said = hello(identity, secrets.token_bytes(NONCE_BYTES))
    sock.sendall(said)
    said += _receive(sock, NONCE_BYTES)
    sock.sendall(code(key, b"process", said))
    with contextlib.suppress(ConnectionError):
        if same(_receive(sock, CODE_BYTES), code(key, b"main", said)):
            sock.settimeout(None)
            return
        raise WorkerError("what listens at the address of the main process is not the main process of this run")
    raise WorkerError(
        f"the main process refused {identity.name} of epoch {identity.epoch}",
        "it has started another one in its place, or has ended",
    )


def _receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        if not (more := sock.recv(size - len(data))):
            raise ConnectionError("the other end has closed the connection")
        data += more
    return data


def keep_alive(sock: socket.socket) -> None:
    """Let a TCP connection notice that the other machine is gone, and send small messages at
    once."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", ALIVE_S),
        ("TCP_KEEPINTVL", ALIVE_S),
        ("TCP_KEEPCNT", PROBES),
        ("TCP_USER_TIMEOUT", 1000 * ALIVE_S * PROBES),
    ):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
