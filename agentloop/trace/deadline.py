"""`Deadline`: one time limit for a whole request, however slowly its answer comes.

HTTP clients limit the time of each read. A server that sends a byte now and then, or `100 Continue`
without end, holds them for ever. When the time of a request is over, the connections of its client
are shut down, and the request ends as one whose connection breaks.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar


class DeadlineExceeded(Exception):
    """The time of a request is over. The text is the cause for a message."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no complete answer within {seconds:g} s")


class Deadline:
    """Limits the requests of one client, whose connections it is shown by `watch`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._over: set[_Request] = set()

    @contextlib.contextmanager
    def within(self, seconds: float, shown_s: float | None = None) -> Iterator[None]:
        """Limit the time of the requests that this thread sends inside.

        Args:
            shown_s: the time that the error names; None: `seconds`.

        Raises:
            DeadlineExceeded: a request inside failed after the time was over.
        """
        request = _Request()
        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._end, (request,))
        timer.daemon = True
        timer.start()
        before = _current.set(self)
        try:
            yield
        except Exception as exc:
            if request in self._over:
                raise DeadlineExceeded(seconds if shown_s is None else shown_s) from exc
            raise
        finally:
            _current.reset(before)
            timer.cancel()
            with self._lock:
                request.runs = False
                self._over.discard(request)

    def add(self, connection: socket.socket) -> None:
        """Shut down a connection, too, when the time of a request is over."""
        with self._lock:
            self._sockets.add(connection)
            if self._over:  # a client tries again after its connection broke
                _shut_down(connection)

    def _end(self, request: _Request) -> None:
        with self._lock:
            if request.runs:
                self._over.add(request)
                for connection in list(self._sockets):
                    _shut_down(connection)


class _Request:
    runs = True


_current: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


def watch(connection: socket.socket) -> None:
    """Tell the deadline of the request that this thread sends of a connection that was opened for
    it. The socket of TLS is another one than that below it: both are to be shown."""
    deadline = _current.get()
    if deadline is not None:
        deadline.add(connection)


def _shut_down(connection: socket.socket) -> None:
    # That of a TLS socket would also touch what the thread that reads is using.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
