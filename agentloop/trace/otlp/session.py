"""The session of requests that OpenTelemetry's exporter sends with. Imports its library.

It notes what was answered, reads a bounded part of it in a bounded time, and takes a confirmation
only if it is whole by the rules of HTTP: http.client takes the end of a broken connection for the
end of an answer's header, and of a body without a length.
"""

from __future__ import annotations

import http.client
import socket
import zlib
from collections.abc import Mapping
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ReadTimeoutError

from agentloop.text import clean
from agentloop.trace.deadline import Deadline, DeadlineExceeded, watch
from agentloop.trace.otlp.answer import ANSWER_BYTES, LONGEST_SHOWN, Answer

BROKEN = "it closed the connection before the end of its answer"

BLANK = (b"\r\n", b"\n")
"""The line that ends a header, and a body in chunks."""


class Session(requests.Session):  # type: ignore[misc]  # it has no types
    """Keeps its last answer, or why there was none.

    Args:
        timeout_s: what `answer.cause` names when a request, its retries included, took longer.
    """

    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self.answer = Answer()
        self._timeout_s = timeout_s
        self._deadline = Deadline()
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter())

    def prepare_request(self, request: requests.Request) -> requests.PreparedRequest:
        try:
            return super().prepare_request(request)
        except requests.RequestException as exc:
            self.answer.cause = _cause(exc)
            raise

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        self.answer.status, self.answer.late = None, False
        try:
            with self._deadline.within(float(options["timeout"]), shown_s=self._timeout_s):
                response = super().send(request, **{**options, "stream": True})
                content = read_answer(response)
        except requests.Timeout as exc:
            self.answer.cause, self.answer.late = str(DeadlineExceeded(self._timeout_s)), True
            self.answer.reached = _connected(exc)
            raise
        except Exception as exc:  # the library keeps it to itself
            self.answer.cause, self.answer.reached = _cause(exc), _connected(exc)
            self.answer.late = isinstance(exc, DeadlineExceeded)
            self.close()  # a connection whose answer was broken can be in the pool; the library repeats the request
            raise
        response._content, response._content_consumed = content, True
        self.answer.take(request.headers.items(), response.status_code, response.headers, content)
        return response

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Follow no redirect; requests would also read the whole answer."""


def read_answer(response: requests.Response) -> bytes:
    """Return the beginning of an answer: all of it, or one byte more than `ANSWER_BYTES`.

    Raises:
        requests.RequestException: the connection broke before its end.
    """
    content = b""
    # `read` waits until it has all that it was asked for, however slowly that comes.
    read = getattr(response.raw, "read1", response.raw.read)
    try:
        while len(content) <= ANSWER_BYTES and (part := read(ANSWER_BYTES + 1 - len(content), decode_content=False)):
            content += part
        if len(content) > ANSWER_BYTES:
            response.close()
            return content
        if 200 <= response.status_code < 300 and not _is_whole(response, content):
            raise requests.ConnectionError(BROKEN) from http.client.IncompleteRead(content)
        if content and response.headers.get("content-encoding", "").lower() in ("gzip", "deflate"):
            unpacker = zlib.decompressobj(32 + zlib.MAX_WBITS)
            content = unpacker.decompress(content, ANSWER_BYTES + 1)
            if not unpacker.eof and len(content) <= ANSWER_BYTES:
                raise requests.ConnectionError(BROKEN) from http.client.IncompleteRead(content)
    except ReadTimeoutError as exc:
        raise requests.Timeout(exc) from exc
    except (HTTPError, zlib.error) as exc:
        raise requests.ConnectionError(exc) from exc
    return content


def _is_whole(response: requests.Response, content: bytes) -> bool:
    """Whether an answer that was read to its end is complete by the rules of HTTP. If only the end
    of the connection ends it, that it has something: the parser sees whether a part is missing."""
    original = response.raw._original_response
    if original.chunked:
        return bool(original.lines.last in BLANK)
    if original.length is None:
        return bool(content)
    return bool(response.raw.length_remaining == 0)


def _cause(exc: BaseException) -> str:
    """Return why there was no answer: the innermost error of the operating system, if any."""
    if isinstance(exc, DeadlineExceeded):
        return str(exc)
    if isinstance(exc, requests.exceptions.InvalidHeader):
        return "a header of the request cannot be sent, correct trace.otlp.headers"
    cause = type(exc).__name__
    inner: BaseException | None = exc
    while inner is not None:
        if isinstance(inner, http.client.RemoteDisconnected | http.client.IncompleteRead):
            cause = BROKEN
        elif isinstance(inner, OSError) and not isinstance(inner, requests.RequestException):
            cause = inner.strerror or type(inner).__name__
        inner = inner.__cause__ or inner.__context__
    return clean(cause, LONGEST_SHOWN)


def _connected(exc: BaseException) -> bool:
    """Whether a request that failed had a connection."""
    inner: BaseException | None = exc
    while inner is not None:
        if isinstance(inner, NewConnectionError | ConnectTimeoutError):
            return False
        inner = inner.__cause__ or inner.__context__
    return True


class _Lines:
    """A file that keeps the last line that was read from it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.last = b""

    def readline(self, limit: int = -1) -> bytes:
        self.last = self._file.readline(limit)
        return self.last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Response(http.client.HTTPResponse):
    """An answer whose header must end.

    Attributes:
        lines: what its lines are read from: of the header, and between the chunks of a body.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fp: Any = _Lines(self.fp)
        self.lines: _Lines = self.fp

    def begin(self) -> None:
        super().begin()
        if self.lines.last not in BLANK:
            raise http.client.RemoteDisconnected(BROKEN)


class _Watched:
    """What is added to a class of connections: the request's deadline ends them."""

    response_class = _Response
    sock: socket.socket

    def _new_conn(self) -> socket.socket:
        connection: socket.socket = super()._new_conn()  # type: ignore[misc]
        watch(connection)
        return connection

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        watch(self.sock)


def _watched(pools: Mapping[str, Any]) -> dict[str, Any]:
    """Return classes of pools, by scheme, whose connections are `_Watched`."""
    return {
        scheme: type("Pool", (pool,), {"ConnectionCls": type("Connection", (_Watched, pool.ConnectionCls), {})})
        for scheme, pool in pools.items()
    }


class _Adapter(HTTPAdapter):  # type: ignore[misc]
    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = _watched(self.poolmanager.pool_classes_by_scheme)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        known = proxy in self.proxy_manager
        manager = super().proxy_manager_for(proxy, **options)
        if not known:
            manager.pool_classes_by_scheme = _watched(manager.pool_classes_by_scheme)
        return manager
