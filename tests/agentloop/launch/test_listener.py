"""Who may connect to the main process: a process with the key of its name and epoch, once, and nobody else."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agentloop.errors import WorkerError
from agentloop.launch import handshake
from agentloop.launch.handshake import CODE_BYTES, NONCE_BYTES, Identity, greet, hello
from agentloop.launch.joining import KEY_VARIABLE, connection_words
from agentloop.launch.listener import Expected, Listener

REPO = Path(__file__).parents[3]


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    opened = Listener.open()
    yield opened
    await opened.close()


async def reach(listener: Listener, identity: Identity, key: bytes) -> socket.socket:
    """Connect as a process does, in a thread."""

    def connect() -> socket.socket:
        sock = socket.create_connection((listener.host, listener.port), timeout=5)
        try:
            greet(sock, identity, key)
        except BaseException:
            sock.close()
            raise
        return sock

    return await asyncio.to_thread(connect)


def all_that_comes(listener: Listener, *sent: bytes) -> bytes:
    """What a stranger gets, until the connection is closed."""
    with socket.create_connection((listener.host, listener.port), timeout=30) as sock:
        received = b""
        try:
            for part in sent:
                sock.sendall(part)
            while more := sock.recv(4096):
                received += more
        except ConnectionError:
            pass
        return received


async def test_a_process_with_its_key_is_connected_in_both_directions(listener: Listener) -> None:
    expected = listener.expect("rank0")
    with await reach(listener, expected.identity, expected.key) as theirs, await expected.connection as ours:
        theirs.sendall(b"ping")
        assert await asyncio.get_running_loop().sock_recv(ours, 4) == b"ping"
        await asyncio.get_running_loop().sock_sendall(ours, b"pong")
        assert theirs.recv(4) == b"pong"
    assert listener.host == "127.0.0.1"


async def test_an_older_epoch_is_refused_and_the_current_one_is_not(listener: Listener) -> None:
    old = listener.expect("rank0")
    new = listener.expect("rank0")
    assert (old.identity.epoch, new.identity.epoch) == (1, 2)
    assert old.connection.cancelled()
    with pytest.raises(WorkerError, match="refused rank0 of epoch 1"):
        await reach(listener, old.identity, old.key)
    with await reach(listener, new.identity, new.key), await new.connection:
        pass


async def test_a_key_opens_one_name_once(listener: Listener) -> None:
    one, other = listener.expect("rank0"), listener.expect("rank1")
    for identity, key in (
        (other.identity, one.key),
        (Identity("rank1", 2), other.key),
        (Identity("rank9", 1), other.key),
        (one.identity, bytes(32)),
    ):
        with pytest.raises(WorkerError, match="refused"):
            await reach(listener, identity, key)
    with await reach(listener, one.identity, one.key), await one.connection, pytest.raises(WorkerError):
        await reach(listener, one.identity, one.key)


async def test_keys_differ_between_runs(listener: Listener) -> None:
    other = Listener.open()
    try:
        assert other.expect("rank0").key != listener.expect("rank0").key
    finally:
        await other.close()


async def test_a_stranger_gets_nothing_but_random_bytes(listener: Listener) -> None:
    expected = listener.expect("rank0")
    nonce = secrets.token_bytes(NONCE_BYTES)
    for sent in (
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(200),),
        (handshake.MAGIC + bytes([0]) + bytes(8 + NONCE_BYTES),),
        (handshake.MAGIC + bytes([255]) + bytes(8 + 255 + NONCE_BYTES),),
    ):
        assert await asyncio.to_thread(all_that_comes, listener, *sent) == b""
    for identity in (expected.identity, Identity("nobody", 1)):
        answer = await asyncio.to_thread(
            all_that_comes, listener, hello(identity, nonce), secrets.token_bytes(CODE_BYTES)
        )
        assert len(answer) == NONCE_BYTES
    assert not expected.connection.done()


async def test_a_stranger_who_says_nothing_is_cut_off(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentloop.launch.listener.TIME_LIMIT_S", 0.2)
    assert await asyncio.to_thread(all_that_comes, listener, b"agl") == b""


async def test_strangers_do_not_keep_a_process_out(listener: Listener) -> None:
    expected = listener.expect("rank0")
    strangers = [socket.create_connection((listener.host, listener.port)) for _ in range(100)]
    with await reach(listener, expected.identity, expected.key), await expected.connection:
        pass
    for stranger in strangers:
        stranger.close()


async def test_what_passes_for_the_main_process_is_refused(listener: Listener) -> None:
    """It repeats what it receives: the code of one direction does not serve for the other."""
    expected = listener.expect("rank0")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def mirror() -> None:
            sock, _ = server.accept()
            with sock:
                sock.recv(4096)
                sock.sendall(bytes(NONCE_BYTES))
                sock.sendall(sock.recv(4096))

        mirroring = asyncio.create_task(asyncio.to_thread(mirror))
        with (
            socket.create_connection(server.getsockname(), timeout=5) as sock,
            pytest.raises(WorkerError, match="is not the main process"),
        ):
            await asyncio.to_thread(greet, sock, expected.identity, expected.key)
        await mirroring


PROGRAM = """
import os, sys, time
from agentloop.launch import joining
joining.GRACE_S = 0.1
sock = joining.connection(None)
sock.sendall(repr(sorted(name for name in os.environ if "AGENTLOOP" in name)).encode())
time.sleep(600)
"""


def start(listener: Listener, expected: Expected, **variables: str) -> subprocess.Popen[str]:
    words = connection_words(f"{listener.host}:{listener.port}", expected.identity)
    # The suite's own variables, such as AGENTLOOP_SHARED, are not what the program may hide.
    inherited = {name: value for name, value in os.environ.items() if "AGENTLOOP" not in name}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM.replace("connection(None)", f"connection(None, {words!r})")],
        env=inherited | {"PYTHONPATH": str(REPO)} | variables,
        stderr=subprocess.PIPE,
        text=True,
    )


async def test_a_busy_process_ends_with_its_connection_and_hides_the_key(listener: Listener) -> None:
    expected = listener.expect("rank0")
    process = start(listener, expected, **{KEY_VARIABLE: expected.key.hex()})
    with await expected.connection as sock:
        assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"[]", "tools would inherit it"
        assert expected.key.hex() not in Path(f"/proc/{process.pid}/cmdline").read_text()
        assert process.poll() is None
    error = await asyncio.to_thread(process.communicate)
    assert process.returncode == 1
    assert "the connection to the main process has closed" in error[1]


async def test_a_process_without_a_key_is_not_started_by_hand(listener: Listener) -> None:
    process = start(listener, listener.expect("rank0"))
    _, error = await asyncio.to_thread(process.communicate)
    assert process.returncode == 1 and "AGENTLOOP_CONNECTION_KEY is not set" in error
