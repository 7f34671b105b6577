"""Reading a body and sending JSON, straight over ASGI: a framework's part here can cost more than a generation."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import Receive, Scope, Send

from rollout_server.errors import HttpError

MAX_BODY_BYTES = 64 * 2**20

Headers = Sequence[tuple[bytes, bytes]]


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """The whole body.

    Raises:
        HttpError: 413 when it is larger than `MAX_BODY_BYTES`; 400 when the client left in the middle.
    """
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    too_large = HttpError(413, "too_large", f"the body is larger than {MAX_BODY_BYTES} bytes")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise too_large
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HttpError(400, "disconnected", "the client left before its body was read")
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


async def send_error(send: Send, error: HttpError) -> None:
    retry = error.retry_after_s
    headers = [] if retry is None else [(b"retry-after", b"%d" % max(1, round(retry)))]
    await send_json(send, error.body, error.status, headers)
