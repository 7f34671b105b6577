"""Read a body and send JSON directly over ASGI: on this path a framework can cost more than a
generation."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout_server.errors import ErrorAnswer, NotServing, RequestError, TooLarge, answer_to

MAX_BODY_BYTES = 64 * 2**20

Headers = Sequence[tuple[bytes, bytes]]


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """Return the whole body.

    Raises:
        TooLarge: it is larger than `MAX_BODY_BYTES`.
        RequestError: the client left before it was sent.
    """
    too_large = TooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes")
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise too_large

    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("the client disconnected before its body was read")
        part = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise too_large
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def send_json(send: Send, body: bytes, status: int = 200, headers: Headers = ()) -> None:
    """Send a whole JSON answer."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, answer: ErrorAnswer) -> None:
    """Send the answer to an error."""
    headers = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
    await send_json(send, answer.body, answer.status, headers)


class UntilStopped:
    """ASGI middleware: 503 for a request that the end of the server cuts off.

    Nothing else cancels the task of a request, and what cancels it is not an error of the server:
    its log gets no traceback.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, note)
        except asyncio.CancelledError:
            if not started:
                await send_error(send, answer_to(NotServing("the server was stopped before the answer: send it again")))
