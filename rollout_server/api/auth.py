"""The bearer token, checked before anything else is read."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from rollout_server.api.asgi import send_error
from rollout_server.errors import Unauthorized, answer_to

OPEN_PATHS = ("/health",)
"""Answered without a token, for liveness probes."""


class BearerToken:
    """ASGI middleware: 401 unless the request carries `Authorization: Bearer <token>`.

    Args:
        token: opens every path; None: all paths but `admin_paths` are open.
        admin_token: if given, only this token opens `admin_paths`; it opens the others too.
        admin_paths: paths that change the server for all clients.
    """

    def __init__(self, app: ASGIApp, token: str | None, admin_token: str | None, admin_paths: frozenset[str]) -> None:
        self._app = app
        self._token = f"Bearer {token}".encode() if token else None
        self._admin_token = f"Bearer {admin_token}".encode() if admin_token else None
        self._admin_paths = admin_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not self._opens(scope["path"], given):
                error = Unauthorized("send this server's bearer token in the Authorization header", "Authorization")
                await send_error(send, answer_to(error))
                return
        await self._app(scope, receive, send)

    def _opens(self, path: str, given: bytes) -> bool:
        # Compare in constant time: the duration must not reveal how much of the token was right.
        admin = self._admin_token is not None and hmac.compare_digest(given, self._admin_token)
        if path in self._admin_paths and self._admin_token is not None:
            return admin
        return admin or self._token is None or hmac.compare_digest(given, self._token)
