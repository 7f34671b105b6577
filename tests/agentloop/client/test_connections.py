"""Connections: what a server may do between and during requests, and what a caller that goes away leaves behind."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from agentloop.client.connections import AnswerTooLarge, ConnectionPool

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """A TCP server that runs a script per connection and counts connections."""

    def __init__(self, serve: Serve) -> None:
        self.serve = serve
        self.connections = 0
        self.gone = asyncio.Event()
        self.url = ""

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self.serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone.set()
        finally:
            writer.close()


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[Server]:
    server = Server(serve)
    listening = await asyncio.start_server(server.run, "127.0.0.1", 0)
    async with listening:
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/generate"
        yield server


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    return await reader.readexactly(length)


async def post(pool: ConnectionPool, url: str, body: bytes = b"x", read: float = 5.0, **more: Any) -> bytes:
    extensions = {"timeout": {"connect": 5.0, "read": read}, **more}
    answer = await pool.handle_async_request(httpx.Request("POST", url, content=body, extensions=extensions))
    return answer.content


def whole(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(whole(await read_request(reader)))


async def test_one_connection_serves_one_request_after_the_other() -> None:
    async with serving(echo) as server:
        pool = ConnectionPool(4)
        assert [await post(pool, server.url, b"%d" % i) for i in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
        assert server.connections == 1
        await pool.aclose()


async def test_answers_reach_their_own_callers_and_connections_are_bounded() -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            body = await read_request(reader)
            await asyncio.sleep(0.001 * (int(body) % 7))
            writer.write(whole(body))

    async with serving(slow) as server:
        pool = ConnectionPool(8)
        bodies = [b"%d" % i for i in range(100)]
        assert await asyncio.gather(*(post(pool, server.url, body) for body in bodies)) == bodies
        assert server.connections <= 8
        await pool.aclose()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc",
        b"HTTP/1.0 200 OK\r\n\r\nabc",  # ends with the connection
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\nabc",
    ],
)
async def test_every_way_to_frame_an_answer_is_read(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for byte in answer:  # in pieces, as a network may deliver it
            writer.write(bytes([byte]))
            await writer.drain()
        if not answer.startswith(b"HTTP/1.0"):
            await reader.readexactly(1)

    async with serving(serve) as server:
        pool = ConnectionPool(1)
        assert await post(pool, server.url) == b"abc"
        await pool.aclose()


async def test_a_caller_that_goes_away_closes_its_connection() -> None:
    asked = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        asked.set()
        await reader.readexactly(1)

    async with serving(silent) as server:
        pool = ConnectionPool(1)
        caller = asyncio.create_task(post(pool, server.url))
        await asked.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await asyncio.wait_for(server.gone.wait(), 5)
        server.serve = echo
        assert await post(pool, server.url) == b"x"  # its place is free again
        await pool.aclose()


async def test_a_server_that_does_not_answer_is_a_timeout() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(10_000)

    async with serving(silent) as server:
        pool = ConnectionPool(1)
        with pytest.raises(httpx.ReadTimeout):
            await post(pool, server.url, read=0.02)
        await asyncio.wait_for(server.gone.wait(), 5)


async def test_a_connection_that_the_server_closed_is_not_used_again() -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(await read_request(reader)))

    async with serving(once) as server:
        pool = ConnectionPool(1)
        for number in range(3):
            assert await post(pool, server.url, b"%d" % number) == b"%d" % number
            await asyncio.sleep(0.02)
        assert server.connections == 3


@pytest.mark.parametrize("extra", ["at once", "later"])
async def test_what_comes_between_two_requests_answers_neither(extra: str) -> None:
    async def talkative(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = await read_request(reader)
        if extra == "later":
            writer.write(whole(body))
            await asyncio.sleep(0.01)
            writer.write(whole(b"STALE"))
        else:
            writer.write(whole(body) + whole(b"STALE"))
        await read_request(reader)
        writer.write(whole(b"too late"))

    async with serving(talkative) as server:
        pool = ConnectionPool(1)
        assert await post(pool, server.url, b"1") == b"1"
        await asyncio.sleep(0.05)
        assert await post(pool, server.url, b"2") == b"2"
        await pool.aclose()


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc", b""]
)
async def test_a_broken_answer_is_a_transport_error(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer)

    async with serving(serve) as server:
        with pytest.raises(httpx.TransportError):
            await post(ConnectionPool(1), server.url)


@pytest.mark.parametrize(
    ("head", "part", "error"),
    [
        (b"transfer-encoding: chunked\r\n\r\n", b"10000\r\n" + bytes(2**16) + b"\r\n", AnswerTooLarge),
        (b"x: y\r\n\r\n", bytes(2**16), AnswerTooLarge),
        (b"transfer-encoding: chunked\r\n\r\n0\r\n", b"X-End: " + b"x" * 2**16 + b"\r\n", httpx.TransportError),
    ],
    ids=["chunks", "until it closes", "trailers"],
)
async def test_an_answer_without_end_is_broken_off(head: bytes, part: bytes, error: type[Exception]) -> None:
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n" + head)
        while sent < 64 * 2**20:
            writer.write(part)
            sent += len(part)
            await writer.drain()

    async with serving(serve) as server:
        with pytest.raises(error):
            await post(ConnectionPool(1), server.url, most_bytes=2**20)
        await asyncio.wait_for(server.gone.wait(), 5)
    assert sent < 32 * 2**20  # what the buffers of the kernel hold may be sent beyond the limit


@pytest.mark.parametrize(
    ("encoding", "body", "expected"),
    [
        (b"gzip", gzip.compress(b"abc", mtime=0), b"abc"),
        (b"deflate", zlib.compress(b"abc"), b"abc"),
        (b"identity", b"abc", b"abc"),
        (b"gzip", gzip.compress(bytes(32 * 2**20), mtime=0), AnswerTooLarge),
        (b"gzip", b"abc", httpx.RemoteProtocolError),
        (b"gzip", gzip.compress(b"abc", mtime=0)[:-4], httpx.RemoteProtocolError),
        (b"gzip, gzip", gzip.compress(gzip.compress(b"abc", mtime=0), mtime=0), httpx.RemoteProtocolError),
        (b"br", b"abc", httpx.RemoteProtocolError),
    ],
)
async def test_a_packed_answer_is_unpacked_within_the_bound(encoding: bytes, body: bytes, expected: Any) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(whole(body).replace(b"\r\n\r\n", b"\r\ncontent-encoding: " + encoding + b"\r\n\r\n", 1))

    async with serving(serve) as server:
        if isinstance(expected, bytes):
            assert await post(ConnectionPool(1), server.url, most_bytes=2**20) == expected
        else:
            with pytest.raises(expected):
                await post(ConnectionPool(1), server.url, most_bytes=2**20)


async def test_nobody_at_the_address_is_a_connect_error() -> None:
    with pytest.raises(httpx.ConnectError, match=r"127\.0\.0\.1:9"):
        await post(ConnectionPool(1), "http://127.0.0.1:9/generate")

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 This is no TLS\r\n\r\n")

    async with serving(plain) as server:
        with pytest.raises(httpx.ConnectError, match="cannot connect"):
            await post(ConnectionPool(1), server.url.replace("http:", "https:"))
