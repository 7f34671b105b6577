"""Limits of a connection: large heads, slow requests, many connections."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from rollout_server.api.asgi import read_body, send_json
from rollout_server.api.connection import MAX_HEAD_BYTES
from rollout_server.process import allow_open_files
from tests.rollout_server.server import serving


async def ask(port: int, *parts: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to bytes on a new connection, which the server then closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return int(head.split()[1]), await reader.readexactly(length)
    finally:
        writer.close()


def get(*headers: bytes) -> bytes:
    return b"\r\n".join([b"GET / HTTP/1.1", b"host: a", *headers, b"", b""])


async def test_a_head_over_64_kib_is_refused_while_it_is_read() -> None:
    async with serving() as port:
        assert (await ask(port, get(b"x: " + b"a" * (MAX_HEAD_BYTES - 1000))))[0] == 200
        for large in (
            get(b"x: " + b"a" * MAX_HEAD_BYTES),
            get(*[b"x%d: a" % i for i in range(20_000)]),
            b"GET /" + b"a" * MAX_HEAD_BYTES,
        ):
            status, body = await ask(port, large)
            assert (status, orjson.loads(body)["error"]["type"]) == (431, "too_large")
        # Without an end: it is refused all the same.
        status, _ = await ask(port, b"GET / HTTP/1.1\r\nx: ", b"a" * 300_000)
        assert status == 431


async def test_a_large_body_is_no_large_head() -> None:
    async with serving() as port:
        body = b"a" * 1_000_000
        head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body)
        assert await ask(port, head + body) == (200, b"1000000")
        chunked = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
        pieces = b"".join(b"400\r\n" + b"a" * 1024 + b"\r\n" for _ in range(300))
        assert await ask(port, chunked + pieces + b"0\r\n\r\n") == (200, b"307200")
        # Trailers and chunk extensions have the head's limit.
        for endless in (b"0\r\nx: " + b"a" * 200_000, b"1;" + b"a" * 200_000):
            assert (await ask(port, chunked, endless))[0] == 431


async def test_many_requests_of_one_connection_do_not_add_up() -> None:
    async with serving() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(10):
            writer.write(get(b"x: " + b"a" * 30_000))
            assert (await reader.readuntil(b"\r\n\r\n0")).startswith(b"HTTP/1.1 200")
        writer.close()


@pytest.mark.parametrize("half", [b"", b"GET / HT", b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{"])
async def test_half_a_request_is_ended(half: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_server.api.connection.GRACE_S", 0.05)
    async with serving(read_timeout_s=0.1) as port:
        status, body = await ask(port, half)
        assert (status, orjson.loads(body)["error"]["type"]) == (408, "timeout")


async def test_a_request_that_has_its_answer_gets_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_server.api.connection.GRACE_S", 0.05)

    async def answer_unread(scope: Any, receive: Any, send: Any) -> None:
        await send_json(send, b"{}", 401)

    async with serving(answer_unread, read_timeout_s=0.1) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 60000000\r\n\r\n{")
        assert (await reader.read()).count(b"HTTP/1.1 ") == 1
        writer.close()
        # The next request of a connection is another one.
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n{")
        assert (await reader.readuntil(b"{}")).startswith(b"HTTP/1.1 401")
        writer.write(b"GET / HT")
        assert (await reader.read()).startswith(b"HTTP/1.1 408")
        writer.close()


async def test_a_request_that_is_being_answered_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_server.api.connection.GRACE_S", 0.02)
    go_on = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await read_body(scope, receive)
        await go_on.wait()
        await send_json(send, b"{}")

    async with serving(app, read_timeout_s=0.02) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get() + b"GET / HT")  # one whole request, and half of the next
        await asyncio.sleep(0.2)
        go_on.set()
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_connections_beyond_the_limit_get_a_503() -> None:
    async with serving(max_connections=2) as port:
        first = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        status, body = await ask(port, b"")
        assert (status, orjson.loads(body)["error"]["type"]) == (503, "overloaded")
        first[0][1].close()
        await asyncio.sleep(0.05)
        assert (await ask(port, get()))[0] == 200
        first[1][1].close()


async def test_what_is_no_http_gets_a_json_error() -> None:
    async with serving() as port:
        status, body = await ask(port, b"\x16\x03\x01 nonsense\r\n\r\n")
        assert (status, orjson.loads(body)["error"]["type"]) == (400, "invalid_request")


def test_the_limit_of_open_files_bounds_the_connections() -> None:
    assert allow_open_files(16) == 16


async def half_closed(port: int, request: bytes) -> bytes:
    """Everything that a client reads which shuts down its writing side after its request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    writer.write_eof()
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


async def test_a_client_that_sends_no_more_gets_its_answer() -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        body = await read_body(scope, receive)
        await asyncio.sleep(0.3)
        await send_json(send, body)

    async with serving(slow) as port:
        post = b"POST / HTTP/1.%d\r\nhost: a\r\ncontent-length: 3\r\n\r\n123"
        interim = b"HTTP/1.1 100 Continue\r\n\r\n"
        for version in (0, 1):
            answer = (await half_closed(port, post % version)).replace(interim, b"")
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert answer.endswith(b"\r\n\r\n123")
        both = await half_closed(port, post % 1 + post % 1)  # the second is answered too
        assert both.count(b"HTTP/1.1 200 OK") == both.count(b"\r\n\r\n123") == 2
        assert await half_closed(port, post[:-2] % 1) == b""  # half a request


async def test_a_client_that_sends_no_more_gets_the_rest_of_a_stream() -> None:
    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"a", b"b", b"c"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0.1)
        await send({"type": "http.response.body", "body": b""})

    async with serving(stream) as port:
        answer = await half_closed(port, get())
        assert answer.endswith(b"1\r\na\r\n1\r\nb\r\n1\r\nc\r\n0\r\n\r\n")
        assert b"100 Continue" not in answer.partition(b"200 OK")[2]


async def test_a_client_that_leaves_is_noticed_before_its_answer() -> None:
    left = asyncio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await read_body(scope, receive)
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    async with serving(wait) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get())
        await writer.drain()
        await asyncio.sleep(0.1)
        assert not left.is_set()
        writer.close()
        await asyncio.wait_for(left.wait(), 10)
