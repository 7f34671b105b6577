"""HTTP/1.1 connections for many small requests in flight at once.

A general client pays for what a rollout needs none of: it looks at every pooled connection for every request, sends
head and body in two system calls, and carries proxies, cookies and redirects. Here a connection is one asyncio protocol
with one request at a time, and a request takes the connection that was freed last: 0.2 ms of CPU a request, where httpx
over httpcore's pools takes 0.9 (measured, 64 in flight).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, cast

import h11
import httpx

LARGEST_HEAD = 64 * 1024


class Lanes(httpx.AsyncBaseTransport):
    """An httpx transport over plain asyncio connections.

    Timeouts are httpx's own: `connect` bounds opening a connection, `read` the whole answer. A request's extension
    `on_data`, a function of bytes, is given the body of a 200 as it comes in; the answer's body is then empty.

    Args:
        max_connections: requests in flight at most; more wait for a free connection.
    """

    def __init__(self, max_connections: int) -> None:
        self._free: list[_Lane] = []
        self._all: set[_Lane] = set()
        self._slots = asyncio.Semaphore(max_connections)
        self._context: ssl.SSLContext | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and read the whole answer.

        Raises:
            httpx.TransportError: the connection cannot be opened, breaks or takes too long.
        """
        timeout: dict[str, float | None] = request.extensions.get("timeout", {})
        async with self._slots:
            lane = self._take() or await self._open(request.url, timeout.get("connect"))
            try:
                async with asyncio.timeout(timeout.get("read")):
                    status, headers, body = await lane.exchange(request)
            except TimeoutError as exc:
                raise httpx.ReadTimeout(f"no answer in {timeout.get('read'):g} s", request=request) from exc
            finally:
                if lane.reusable:
                    self._free.append(lane)
                else:  # also after a cancellation: the server is to see that nobody waits any more
                    self._all.discard(lane)
                    lane.abort()
        return httpx.Response(status, headers=headers, content=body, request=request)

    async def aclose(self) -> None:
        for lane in self._all:
            lane.abort()
        self._all.clear()
        self._free.clear()

    def _take(self) -> _Lane | None:
        while self._free:
            lane = self._free.pop()
            if lane.reusable:
                return lane
            self._all.discard(lane)  # the server closed it meanwhile
        return None

    async def _open(self, url: httpx.URL, timeout: float | None) -> _Lane:
        secure = url.scheme == "https"
        if secure and self._context is None:
            self._context = ssl.create_default_context()
        try:
            async with asyncio.timeout(timeout):
                _, lane = await asyncio.get_running_loop().create_connection(
                    _Lane, url.host, url.port or (443 if secure else 80), ssl=self._context if secure else None
                )
        except TimeoutError as exc:
            raise httpx.ConnectTimeout(f"no connection to {url.netloc.decode()} in time") from exc
        except OSError as exc:
            raise httpx.ConnectError(f"no connection to {url.netloc.decode()}: {exc}") from exc
        self._all.add(lane)
        return lane


class _Lane(asyncio.Protocol):
    """One connection; `exchange` is never called twice at once."""

    def __init__(self) -> None:
        self._parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=LARGEST_HEAD)
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, Any, bytes]] | None = None
        self._head: h11.Response | None = None
        self._body: list[bytes] = []
        self._take: Callable[[bytes], None] = self._body.append
        self._on_data: Callable[[bytes], None] | None = None

    @property
    def reusable(self) -> bool:
        """Whether another request can be sent."""
        return (
            self._transport is not None
            and not self._transport.is_closing()
            and self._answer is None
            and self._parser.our_state is h11.IDLE
        )

    async def exchange(self, request: httpx.Request) -> tuple[int, Any, bytes]:
        """Status, headers and body of the answer."""
        transport, parser = self._transport, self._parser
        assert transport is not None
        body = await request.aread()
        self._head, self._body = None, []
        self._take = self._body.append
        self._on_data = request.extensions.get("on_data")
        answer = self._answer = asyncio.get_running_loop().create_future()
        head = parser.send(h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw))
        assert head is not None
        parser.send(h11.Data(data=body))
        parser.send(h11.EndOfMessage())
        transport.write(head + body)
        result: tuple[int, Any, bytes] = await answer
        self._answer = None
        if parser.our_state is h11.DONE and parser.their_state is h11.DONE and not parser.trailing_data[0]:
            parser.start_next_cycle()
        return result

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are no subclasses

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            self.abort()  # what comes between two requests is an answer to neither
            return
        self._parser.receive_data(data)
        self._read_events()

    def eof_received(self) -> None:
        self._parser.receive_data(b"")
        self._read_events()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(httpx.ReadError(f"the connection broke: {exc or 'closed by the server'}"))

    def _read_events(self) -> None:
        if self._answer is None or self._answer.done():
            return
        try:
            while True:
                event = self._parser.next_event()
                if isinstance(event, h11.Response):
                    self._head = event
                    if self._on_data is not None and event.status_code == 200:
                        self._take = self._on_data
                elif isinstance(event, h11.Data):
                    self._take(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    assert self._head is not None
                    self._answer.set_result((self._head.status_code, list(self._head.headers), b"".join(self._body)))
                    return
                elif not isinstance(event, h11.InformationalResponse):
                    return  # NEED_DATA, or the server closed the connection, which connection_lost tells
        except h11.RemoteProtocolError as exc:
            self._fail(httpx.RemoteProtocolError(f"not an HTTP answer: {exc}"))

    def _fail(self, error: httpx.TransportError) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
