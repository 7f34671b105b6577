"""Limits of connections: their number, and the size and duration of a request's head and body.

They hold before a token is checked, and for every path. The parser itself has no limit: a head of
60 MB would hold the event loop for seconds.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from agentloop.config.server import ServerSettings
from rollout_server.errors import ErrorAnswer
from rollout_server.process import allow_open_files

MAX_HEAD_BYTES = 64 * 1024
"""Most bytes of a request line with its headers. Also the most bytes in a row that add nothing to a
body: chunk sizes, trailers."""

BODY_BYTES_PER_S = 64 * 1024
"""Slowest body: it may take one second more for each of these bytes, as on a slow network."""

GRACE_S = 1.0
"""A request that is overdue gets this much longer: after a pause of this process, timers run before
the bytes that have arrived meanwhile are read."""

RESERVED_FILES = 64
"""Open files that are kept for everything else; half of all where fewer than 128 are allowed."""

PROBE_S = 0.1
PROBE_EVERY_S = 1.0
"""Seconds to the second, and between later interim answers to a client that sends no more."""


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits: 431 for a head over `MAX_HEAD_BYTES`, 408 for a request
    that does not arrive in time, 503 beyond the largest number of connections.

    `limited` binds the last two arguments.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        max_connections: int,
        read_timeout_s: float,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._max_connections = max_connections
        self._read_timeout_s = read_timeout_s
        self._refused = False  # what still arrives is thrown away
        self._receiving = False  # part of a request has arrived
        self._in_body = False  # its head has arrived, its end has not
        self._unproductive = 0  # bytes since the last that ended a head or added to a body
        self._body_bytes = 0
        self._since = 0.0
        self._deadline: asyncio.TimerHandle | None = None
        self._prober: asyncio.TimerHandle | None = None

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            reason = f"{self._max_connections} connections are open, which is the limit (--max-connections)"
            self._refuse(ErrorAnswer(503, "overloaded", reason, retry_after_s=1.0), linger=False)
            return
        self._watch()  # a connection on which nothing ever arrives

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        if self._prober is not None:
            self._prober.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection open if a whole request is still to be answered.

        A client that has shut down its writing side waits for the answer. One that has left looks
        the same, until something is written to it: see `_probe`.
        """
        if self._refused or self._receiving or self.cycle is None or self.cycle.response_complete:
            return False
        self._unwatch()
        self.cycle.keep_alive = False  # the newest request: the connection is closed after its answer
        if self.scope["http_version"] == "1.1":
            self._probe(PROBE_S)
        return True

    def data_received(self, data: bytes) -> None:
        while data and not self._refused:
            room = MAX_HEAD_BYTES - self._unproductive
            part, data = (data, b"") if len(data) <= room else (data[:room], data[room:])
            self._unproductive += len(part)
            super().data_received(part)  # sets `_unproductive` to 0 where it gets further
            if self._unproductive >= MAX_HEAD_BYTES and not self._refused:
                reason = f"the head of the request is larger than {MAX_HEAD_BYTES} bytes"
                self._refuse(ErrorAnswer(431, "too_large", reason))

        if self._refused:
            return
        if not self._receiving:
            self._unwatch()
        elif self._deadline is None:
            self._watch()

    # -- httptools

    def on_message_begin(self) -> None:
        self._receiving = True
        self._body_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._unproductive = 0
        self._in_body = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unproductive = 0
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._receiving = self._in_body = False
        self._unproductive = 0
        super().on_message_complete()

    # -- time

    def _watch(self) -> None:
        self._since = self.loop.time()
        self._deadline = self.loop.call_later(self._read_timeout_s, self._check, False)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _check(self, overdue: bool) -> None:
        """Close the connection if its request should have arrived by now."""
        allowed = self._read_timeout_s + self._body_bytes / BODY_BYTES_PER_S
        left = allowed - (self.loop.time() - self._since)
        if self.flow.read_paused or self._answers_another():
            self._since = self.loop.time()  # the server reads nothing: the client is not to blame
            self._deadline = self.loop.call_later(self._read_timeout_s, self._check, False)
        elif left > 0:
            self._deadline = self.loop.call_later(left, self._check, False)
        elif not overdue:
            self._deadline = self.loop.call_later(GRACE_S, self._check, True)
        else:
            self._refuse(ErrorAnswer(408, "timeout", f"the request did not arrive within {allowed:.0f} s"))

    def _answers_another(self) -> bool:
        """Return whether an earlier, complete request of this connection is being answered."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def _probe(self, next_s: float) -> None:
        """Write an interim answer until the answer begins.

        It has no meaning to a client that waits; the system of one that has left refuses it, so
        that the next write ends the connection.
        """
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        if not self.pipeline and not self.cycle.response_started:  # nothing of an answer is under way
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._prober = self.loop.call_later(next_s, self._probe, PROBE_EVERY_S)

    # -- answers

    def send_400_response(self, msg: str) -> None:
        self._refuse(ErrorAnswer(400, "invalid_request", "this is not an HTTP/1.1 request"))

    def _refuse(self, answer: ErrorAnswer, *, linger: bool = True) -> None:
        """Answer, unless the request has its answer or a part of it, and close the connection.

        Args:
            linger: read on for `GRACE_S` seconds: closing a connection with unread bytes may take
                the answer away from the client.
        """
        self._unwatch()
        self._refused = True
        self._receiving = False
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return

        # A request may be answered before its body has arrived: a 401, a 413.
        if not (self._in_body and self.cycle is not None and self.cycle.response_complete):
            self._write(answer)
        if not linger:
            self.transport.close()
            return
        self.transport.write_eof()
        self._deadline = self.loop.call_later(GRACE_S, self.transport.close)

    def _write(self, answer: ErrorAnswer) -> None:
        headers = {
            "content-type": "application/json",
            "content-length": str(len(answer.body)),
            "connection": "close",
            **answer.headers,
        }
        lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + answer.body)


def most_connections(wanted: int) -> int:
    """Return how many of `wanted` connections may be open at once under the limit of open files."""
    files = allow_open_files(wanted + RESERVED_FILES)
    return max(1, min(wanted, files - min(RESERVED_FILES, files // 2)))


def limited(settings: ServerSettings) -> type[asyncio.Protocol]:
    """Return the protocol class with the limits of `settings`, as uvicorn takes it."""
    most = most_connections(settings.max_connections)
    read_timeout_s = settings.read_timeout_s

    class Protocol(LimitedProtocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, max_connections=most, read_timeout_s=read_timeout_s)

    return Protocol
