"""A server in this process that answers each request with bytes, whatever HTTP says of them."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable


class RawServer:
    """Reads a request, lets `answer` write to its connection, and closes it."""

    def __init__(self, answer: Callable[[socket.socket], None], tls: ssl.SSLContext | None = None) -> None:
        self.requests = 0
        self._answer = answer
        self._tls = tls
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Take no more requests."""
        self._socket.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            with connection:
                data = b""
                while b"\r\n\r\n" not in data:
                    data += connection.recv(2**16)
                head, _, body = data.partition(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                while length is not None and len(body) < int(length[1]):
                    body += connection.recv(2**16)
                self.requests += 1
                self._answer(connection)


def writes(content: bytes) -> Callable[[socket.socket], None]:
    """Return an answer of these bytes."""
    return lambda connection: connection.sendall(content)


def drips(first: bytes, again: bytes) -> Callable[[socket.socket], None]:
    """Return an answer that goes on for as long as it is read."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(again)
            time.sleep(0.05)

    return answer


ENDLESS = {
    "header": drips(b"HTTP/1.1 200 OK\r\nx-a: ", b"a"),
    "continue": drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "size of a chunk": drips(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;", b"a"),
    "body": drips(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 60000\r\n\r\n", b" "),
}
"""Answers that come slowly and do not end, by what of them."""
