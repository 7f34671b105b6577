"""HTTP/1.1 connections for many small requests in flight at once.

A general client pays for what a rollout needs none of: it looks at every pooled connection for every request, sends
head and body in two system calls, and carries proxies, cookies and redirects. Here a connection is one asyncio protocol
with one request at a time, and a request takes the connection that was freed last.
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

LARGEST_HEAD = 64 * 1024

Headers = list[tuple[bytes, bytes]]
OnData = Callable[[bytes], None]

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(rb"[^\x00\r\n]*")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where connections go."""

    host: str
    port: int
    secure: bool = False

    @classmethod
    def of(cls, url: httpx.URL) -> Origin:
        secure = url.scheme == "https"
        return cls(url.host, url.port or (443 if secure else 80), secure)


def request_head(method: bytes, target: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A request up to its body, without the blank line.

    Raises:
        httpx.LocalProtocolError: a header cannot be sent, such as one with a line break in it.
    """
    lines = [b"%b %b HTTP/1.1" % (method, target)]
    for name, value in headers:
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise httpx.LocalProtocolError(f"header {name!r} cannot be sent with the value {value!r}")
        lines.append(b"%b: %b" % (name, value))
    if not _VALUE.fullmatch(target) or b" " in target:
        raise httpx.LocalProtocolError(f"{target!r} is no request target")
    return b"\r\n".join(lines) + b"\r\n"


class ConnectionPool(httpx.AsyncBaseTransport):
    """An httpx transport over plain asyncio connections.

    Timeouts are httpx's own: `connect` bounds opening a connection, `read` the whole answer. A request's extension
    `on_data`, a function of bytes, is given the body of a 200 as it comes in; the answer's body is then empty.

    Args:
        max_connections: requests in flight at most; more wait for a free connection.
    """

    def __init__(self, max_connections: int) -> None:
        self._free: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._slots = asyncio.Semaphore(max_connections)
        self._context: ssl.SSLContext | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and read the whole answer.

        Raises:
            httpx.TransportError: the connection cannot be opened, breaks or takes too long.
        """
        timeout: dict[str, float | None] = request.extensions.get("timeout", {})
        head = request_head(request.method.encode(), request.url.raw_path, request.headers.raw)
        status, headers, body = await self.send(
            Origin.of(request.url),
            head,
            await request.aread(),
            connect_s=timeout.get("connect"),
            read_s=timeout.get("read"),
            on_data=request.extensions.get("on_data"),
        )
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
    ) -> tuple[int, Headers, bytes]:
        """Send what `request_head` made and a body; returns status, headers and body of the answer.

        Raises:
            httpx.TransportError: the connection cannot be opened, breaks or takes too long.
        """
        async with self._slots:
            lane = self._take(origin) or await self._open(origin, connect_s)
            try:
                if read_s is None:
                    return await lane.exchange(head, body, on_data)
                async with asyncio.timeout(read_s):
                    return await lane.exchange(head, body, on_data)
            except TimeoutError as exc:
                raise httpx.ReadTimeout(f"no answer in {read_s:g} s") from exc
            finally:
                if lane.reusable:
                    self._free.append(lane)
                else:  # also after a cancellation: the server is to see that nobody waits any more
                    self._all.discard(lane)
                    lane.abort()

    async def aclose(self) -> None:
        for lane in self._all:
            lane.abort()
        self._all.clear()
        self._free.clear()

    def _take(self, origin: Origin) -> _Connection | None:
        while self._free:
            lane = self._free.pop()
            if lane.reusable and lane.origin == origin:
                return lane
            self._all.discard(lane)  # the server closed it meanwhile, or it leads elsewhere
            lane.abort()
        return None

    async def _open(self, origin: Origin, timeout: float | None) -> _Connection:
        if origin.secure and self._context is None:
            self._context = ssl.create_default_context()
        name = f"{origin.host}:{origin.port}"
        try:
            async with asyncio.timeout(timeout):
                _, lane = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(origin), origin.host, origin.port, ssl=self._context if origin.secure else None
                )
        except TimeoutError as exc:
            raise httpx.ConnectTimeout(f"no connection to {name} in time") from exc
        except OSError as exc:
            raise httpx.ConnectError(f"no connection to {name}: {exc}") from exc
        self._all.add(lane)
        return lane


class _Connection(asyncio.Protocol):
    """One connection; `exchange` is never called twice at once. Some methods are the parser's callbacks."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, Headers, bytes]] | None = None
        self._clean = True  # nothing but whole answers has come so far
        self._parser = httptools.HttpResponseParser(self)
        self._start(None)

    def _start(self, on_data: OnData | None) -> None:
        self._headers: Headers = []
        self._body: list[bytes] = []
        self._on_data = on_data
        self._head_bytes = 0
        self._delimited = False
        self._in_body = False

    @property
    def reusable(self) -> bool:
        """Whether another request can be sent."""
        return self._clean and self._answer is None and self._transport is not None and not self._transport.is_closing()

    async def exchange(self, head: bytes, body: bytes, on_data: OnData | None) -> tuple[int, Headers, bytes]:
        """Status, headers and body of the answer."""
        assert self._transport is not None
        self._start(on_data)
        self._clean = False
        answer = self._answer = asyncio.get_running_loop().create_future()
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

    # -- asyncio.Protocol --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are no subclasses

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.abort()  # what comes between two requests is an answer to neither
            return
        if not self._in_body:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(httpx.RemoteProtocolError("not an HTTP answer: the server changed the protocol"))
        except httptools.HttpParserError as exc:
            self._fail(httpx.RemoteProtocolError(f"not an HTTP answer: {exc}"))
        if not self._in_body and self._head_bytes > LARGEST_HEAD:
            self._fail(httpx.RemoteProtocolError(f"not an HTTP answer: its head is over {LARGEST_HEAD} bytes"))

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None and self._in_body and not self._delimited:
            self._finish()  # the end of the connection is the end of such a body
        else:
            self._fail(httpx.ReadError(f"the connection broke: {exc or 'closed by the server'}"))

    # -- httptools ---------------------------------------------------------------------------------------------------

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
            self._start(self._on_data)  # the answer itself is still to come
            return
        if self._answer is not None and not self._answer.done():
            self._clean = self._parser.should_keep_alive()
            self._finish()

    def on_message_begin(self) -> None:
        if self._answer is None or self._answer.done():
            self._clean = False  # something follows the answer
            self._start(None)

    def _finish(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), self._headers, b"".join(self._body)))

    def _fail(self, error: httpx.TransportError) -> None:
        self._clean = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
