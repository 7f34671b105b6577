"""The transports to a server behind a URL: streamable HTTP, and SSE of older servers."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client

from tools.mcp.settings import ServerSettings
from tools.mcp.stdio import Output

CONNECT_S = 10.0
MOST_BYTES = 2**25
"""Bytes of one event or answer."""


@asynccontextmanager
async def remote(settings: ServerSettings, output: Output) -> AsyncGenerator[tuple[Any, Any]]:
    """Yield the streams of messages, received and sent; keep the status of the last answer."""
    assert settings.url is not None
    limits = httpx2.Timeout(settings.timeout_s, connect=CONNECT_S, read=None)
    if settings.transport == "sse":

        def client(headers: Any = None, timeout: Any = None, auth: Any = None) -> httpx2.AsyncClient:
            return httpx2.AsyncClient(headers=settings.headers, timeout=limits, transport=_Bounded(output))

        async with sse_client(settings.url, httpx_client_factory=client) as streams:
            yield streams
        return
    async with (
        httpx2.AsyncClient(headers=settings.headers, timeout=limits, transport=_Bounded(output)) as http,
        streamable_http_client(settings.url, http_client=http, max_sse_event_size=MOST_BYTES) as streams,
    ):
        yield streams


class _Bounded(httpx2.AsyncHTTPTransport):
    """Breaks off a JSON answer that is too large; streams of events have a bound for each event.

    The bound is of bytes as they are sent, so that answers have to be sent as they are: a packed
    one of some kilobytes may be gigabytes.
    """

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        request.headers["accept-encoding"] = "identity"
        self._output.status = None
        response = await super().handle_async_request(request)
        self._output.status = response.status_code
        packed = response.headers.get("content-encoding", "identity").strip().lower()
        if packed not in ("", "identity"):
            await response.aclose()
            raise httpx2.ReadError(f"an answer packed as {packed[:40]!r}, which was not asked for")
        if "text/event-stream" not in response.headers.get("content-type", ""):
            response.stream = _BoundedStream(response.stream)
        return response


class _BoundedStream(httpx2.AsyncByteStream):
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncGenerator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > MOST_BYTES:
                raise httpx2.ReadError(f"an answer of more than {MOST_BYTES >> 20} MB")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
