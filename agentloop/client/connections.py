"""An HTTP/1.1 connection pool for many small requests in flight at once.

A general client pays for features that a rollout does not use: for each request it scans every
pooled connection, it sends head and body in two system calls, and it handles proxies, cookies and
redirects. Here a connection is one asyncio protocol with one request at a time, and a request takes
the connection that was used last.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import httptools
import httpx

from agentloop.client.open_files import most_connections
from agentloop.wire import unpacked

LARGEST_HEAD = 64 * 1024
"""Most bytes of an answer's status line and headers."""

Headers = list[tuple[bytes, bytes]]

MOST_BYTES = "most_bytes"
"""Request extension: bytes of an answer, as sent and as unpacked; null: no limit."""

OnData = Callable[[bytes], None]
"""Receives the body of an answer as it arrives."""

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(rb"[^\x00\r\n]*")


class AnswerTooLarge(httpx.TransportError):
    """The answer has more bytes than the request allows; it was not read to its end."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The server at the other end of a connection."""

    host: str
    port: int
    secure: bool = False

    @classmethod
    def of(cls, url: httpx.URL) -> Origin:
        secure = url.scheme == "https"
        return cls(url.host, url.port or (443 if secure else 80), secure)


def request_head(method: bytes, target: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a request's first line and headers, without the blank line that ends them.

    Raises:
        httpx.LocalProtocolError: the target or a header cannot be sent, for instance because it
            contains a line break.
    """
    lines = [b"%b %b HTTP/1.1" % (method, target)]
    for name, value in headers:
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            # Without the value, which may be a secret.
            raise httpx.LocalProtocolError(
                f"header {name!r} cannot be sent: its name or its value has control characters"
            )
        lines.append(b"%b: %b" % (name, value))

    if not _VALUE.fullmatch(target) or b" " in target:
        raise httpx.LocalProtocolError(f"{target!r} is not a valid request target")
    return b"\r\n".join(lines) + b"\r\n"


class ConnectionPool(httpx.AsyncBaseTransport):
    """An httpx transport over plain asyncio connections.

    Timeouts are httpx's own: `connect` limits the opening of a connection, `read` the whole answer.
    The request extension `on_data`, a function of bytes, receives the body of a 200 as it arrives;
    the response's body is then empty. `most_bytes` bounds the answer.

    Args:
        max_connections: largest number of requests in flight; further ones wait for a connection.
            Fewer where the limit of open files does not allow as many.
    """

    def __init__(self, max_connections: int) -> None:
        self._free: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._slots = asyncio.Semaphore(most_connections(max_connections))
        self._context: ssl.SSLContext | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and read the whole answer.

        Raises:
            AnswerTooLarge: it has more than `most_bytes`.
            httpx.TransportError: the connection cannot be opened, breaks or takes too long, or the
                answer is packed in a way that it cannot be read.
        """
        timeout: dict[str, float | None] = request.extensions.get("timeout", {})
        most: int | None = request.extensions.get(MOST_BYTES)
        head = request_head(request.method.encode(), request.url.raw_path, request.headers.raw)
        status, headers, body = await self.send(
            Origin.of(request.url),
            head,
            await request.aread(),
            connect_s=timeout.get("connect"),
            read_s=timeout.get("read"),
            on_data=request.extensions.get("on_data"),
            most_bytes=most,
        )
        body, headers = _plain(body, headers, most)
        return httpx.Response(status, headers=headers, content=body, request=request)

    async def send(
        self,
        origin: Origin,
        head: bytes,
        body: bytes,
        *,
        connect_s: float | None = None,
        read_s: float | None = None,
        on_data: OnData | None = None,
        most_bytes: int | None = None,
    ) -> tuple[int, Headers, bytes]:
        """Send a head from `request_head` and a body; return status, headers and body of the
        answer.

        Raises:
            httpx.TransportError: the connection cannot be opened, breaks or takes too long.
        """
        async with self._slots:
            connection = self._take(origin) or await self._open(origin, connect_s)
            try:
                if read_s is None:
                    return await connection.exchange(head, body, on_data, most_bytes)
                async with asyncio.timeout(read_s):
                    return await connection.exchange(head, body, on_data, most_bytes)
            except TimeoutError as exc:
                raise httpx.ReadTimeout(f"no answer within {read_s:g} s") from exc
            finally:
                if connection.reusable:
                    self._free.append(connection)
                else:
                    # Also after a cancellation: the server then sees that the caller has left.
                    self._all.discard(connection)
                    connection.abort()

    async def aclose(self) -> None:
        for connection in self._all:
            connection.abort()
        self._all.clear()
        self._free.clear()

    def _take(self, origin: Origin) -> _Connection | None:
        """Return an idle connection to `origin`, the one used last; None if there is none."""
        while self._free:
            connection = self._free.pop()
            if connection.reusable and connection.origin == origin:
                return connection

            # The server has closed it since, or it belongs to another server.
            self._all.discard(connection)
            connection.abort()
        return None

    async def _open(self, origin: Origin, timeout: float | None) -> _Connection:
        if origin.secure and self._context is None:
            self._context = ssl.create_default_context()

        name = f"{origin.host}:{origin.port}"
        try:
            async with asyncio.timeout(timeout):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(origin), origin.host, origin.port, ssl=self._context if origin.secure else None
                )
        except TimeoutError as exc:
            raise httpx.ConnectTimeout(f"connecting to {name} timed out") from exc
        except OSError as exc:
            raise httpx.ConnectError(f"cannot connect to {name}: {exc}") from exc

        self._all.add(connection)
        return connection


class _Connection(asyncio.Protocol):
    """One connection with one exchange at a time; some of its methods are httptools' callbacks."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, Headers, bytes]] | None = None
        self._clean = True  # only whole answers have arrived so far
        self._parser = httptools.HttpResponseParser(self)
        self._most_bytes: int | None = None
        self._received = 0
        self._start(None)

    def _start(self, on_data: OnData | None) -> None:
        """Reset the state of one answer."""
        self._headers: Headers = []
        self._body: list[bytes] = []
        self._on_data = on_data
        self._head_bytes = 0
        self._delimited = False
        self._in_body = False

    @property
    def reusable(self) -> bool:
        """Whether the connection can carry another request."""
        return self._clean and self._answer is None and self._transport is not None and not self._transport.is_closing()

    async def exchange(
        self, head: bytes, body: bytes, on_data: OnData | None, most_bytes: int | None
    ) -> tuple[int, Headers, bytes]:
        """Send a request; return status, headers and body of the answer."""
        assert self._transport is not None
        self._start(on_data)
        self._most_bytes, self._received = most_bytes, 0
        self._clean = False
        answer = self._answer = asyncio.get_running_loop().create_future()

        # Head and body in one write: one system call, and one packet for a small request.
        if body or not head.startswith(b"GET "):
            length = b"" if b"\r\ncontent-length:" in head.lower() else b"content-length: %d\r\n" % len(body)
            self._transport.write(b"%b%b\r\n%b" % (head, length, body))
        else:
            self._transport.write(head + b"\r\n")

        try:
            result: tuple[int, Headers, bytes] = await answer
        finally:
            self._answer = None
        return result

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses of it

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.abort()  # data between two requests belongs to neither
            return

        # What frames the body counts as well: its chunks, and what may follow them.
        self._received += len(data)
        if self._most_bytes is not None and self._received > self._most_bytes + LARGEST_HEAD:
            self._fail(AnswerTooLarge(f"the answer has more than {self._most_bytes} bytes"))
            self.abort()
            return
        if not self._in_body:
            self._head_bytes += len(data)

        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(httpx.RemoteProtocolError("not an HTTP answer: the server switched protocols"))
        except httptools.HttpParserError as exc:
            self._fail(httpx.RemoteProtocolError(f"not an HTTP answer: {exc}"))

        if not self._in_body and self._head_bytes > LARGEST_HEAD:
            self._fail(httpx.RemoteProtocolError(f"not an HTTP answer: its headers are over {LARGEST_HEAD} bytes"))

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None and self._in_body and not self._delimited:
            self._finish()  # a body without a length ends with the connection
        else:
            self._fail(httpx.ReadError(f"the connection was lost: {exc or 'closed by the server'}"))

    # -- httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._in_body = True
        names = {name.lower() for name, _ in self._headers}
        self._delimited = b"content-length" in names or b"transfer-encoding" in names

    def on_body(self, data: bytes) -> None:
        if self._on_data is not None and self._parser.get_status_code() == 200:
            self._on_data(data)
        else:
            self._body.append(data)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:
            self._start(self._on_data)  # an interim answer (1xx); the final one follows
            return
        if self._answer is not None and not self._answer.done():
            self._clean = self._parser.should_keep_alive()
            self._finish()

    def on_message_begin(self) -> None:
        if self._answer is None or self._answer.done():
            self._clean = False  # data after the end of the answer
            self._start(None)

    def _finish(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), self._headers, b"".join(self._body)))

    def _fail(self, error: httpx.TransportError) -> None:
        self._clean = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


def _plain(body: bytes, headers: Headers, most: int | None) -> tuple[bytes, Headers]:
    """Return a body unpacked, and the headers that are then true.

    Not by httpx, which unpacks whatever comes, without a bound.
    """
    packed = [value for name, value in headers if name.lower() == b"content-encoding"]
    encoding = b",".join(packed).decode("latin-1").strip().lower()
    if body and encoding not in ("", "identity"):
        try:
            body = unpacked(body, encoding, most)
        except OverflowError:
            raise AnswerTooLarge(f"the answer has more than {most} bytes") from None
        except ValueError as exc:
            raise httpx.RemoteProtocolError(f"the answer cannot be unpacked: {exc}") from exc
    return body, [pair for pair in headers if pair[0].lower() != b"content-encoding"]
