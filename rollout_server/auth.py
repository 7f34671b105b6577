"""The bearer token, checked before anything else is read."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from rollout_server.errors import HttpError
from rollout_server.http import send_error

OPEN_PATHS = ("/health",)
"""Answered without a token: liveness probes have none."""


class BearerToken:
    """ASGI middleware: 401 unless the request carries `Authorization: Bearer <token>`."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            # Compared in constant time: how long it takes tells nothing about the token.
            if not hmac.compare_digest(given, self._expected):
                await send_error(send, HttpError(401, "unauthorized", "a bearer token is needed", "Authorization"))
                return
        await self._app(scope, receive, send)
