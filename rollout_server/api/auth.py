"""Who may send a request: the bearer token, and no web page of another origin.

Checked before anything else of a request is read.

A web page can send requests to a server on the reader's own machine. Browsers name the page in
`Origin` and `Sec-Fetch-Site`, which a page cannot change, and let a page send JSON to another
origin only after a question that this server never answers with yes. A page that points its own
name at this machine (DNS rebinding) is recognized by `Host`. Clients other than browsers send
neither `Origin` nor `Sec-Fetch-Site`.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from agentloop.config.server import LOOPBACK
from rollout_server.api.asgi import send_error
from rollout_server.errors import Forbidden, RequestError, Unauthorized, UnsupportedMediaType, answer_to

OPEN_PATHS = ("/health",)
"""Answered without a token, for liveness probes."""

SINGLE_HEADERS = frozenset({b"host", b"origin", b"sec-fetch-site", b"authorization", b"content-type"})
"""Headers that decide about a request. A request that repeats one is refused: a proxy in front may
have read another of its values."""

_NAME = re.compile(rb"(\[[^]]*\]|[^:]*)(:\d*)?")
_LOOPBACK_V4 = re.compile(rb"127(\.\d{1,3}){3}")
_SAME_SITE = (b"same-origin", b"none")


class Gate:
    """ASGI middleware: 401 without the token, 403 for web pages of another origin.

    Args:
        token: bearer token that opens every path; None: all paths but `admin_paths` are open, and
            `Host` must be a name of this machine's loopback address.
        admin_token: if given, only this token opens `admin_paths`; it opens the others too.
        admin_paths: paths that change the server for all clients.
        host: address that the server is bound to.
    """

    def __init__(
        self, app: ASGIApp, token: str | None, admin_token: str | None, admin_paths: frozenset[str], host: str
    ) -> None:
        self._app = app
        self._token = token.encode() if token else None
        self._admin_token = admin_token.encode() if admin_token else None
        self._admin_paths = admin_paths
        self._hosts = {name.encode() for name in (*LOOPBACK, "[::1]", host.lower(), f"[{host.lower()}]")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            names = [name for name, _ in scope["headers"] if name in SINGLE_HEADERS]
            if len(set(names)) < len(names):
                error: RequestError | None = _repeated(names)
            else:
                error = self._refusal(scope["method"], scope["path"], dict(scope["headers"]))
            if error is not None:
                await send_error(send, answer_to(error))
                return
        await self._app(scope, receive, send)

    def _refusal(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> RequestError | None:
        """Return why the request is refused, or None."""
        host = headers.get(b"host", b"").lower()
        origin = headers.get(b"origin")
        if origin is not None and (not host or origin.lower().partition(b"://")[2] != host):
            return Forbidden("a web page of another origin may not use this server: send no Origin header", "Origin")
        if headers.get(b"sec-fetch-site", b"none") not in _SAME_SITE:
            return Forbidden("a web page of another site may not use this server", "Sec-Fetch-Site")
        if self._token is None and host and not self._is_this_machine(host):
            return Forbidden(
                "without a token, this server answers only requests to 127.0.0.1, localhost or ::1: use one of these "
                "names in the URL, or start the server with --token-env",
                "Host",
            )
        if not self._opens(path, headers.get(b"authorization", b"")):
            return Unauthorized("send this server's bearer token in the Authorization header", "Authorization")

        if method != "GET" and not _is_json(headers.get(b"content-type")):
            return UnsupportedMediaType(
                "the body must be JSON: send the header Content-Type: application/json", "Content-Type"
            )
        return None

    def _is_this_machine(self, host: bytes) -> bool:
        match = _NAME.fullmatch(host)
        if match is None:
            return False
        name = match[1]
        return name in self._hosts or _LOOPBACK_V4.fullmatch(name) is not None

    def _opens(self, path: str, given: bytes) -> bool:
        if path in OPEN_PATHS or (self._token is None and self._admin_token is None):
            return True

        scheme, _, token = given.partition(b" ")
        token = token.strip() if scheme.lower() == b"bearer" else b""
        # Compare in constant time: the duration must not reveal how much of the token was right.
        admin = self._admin_token is not None and hmac.compare_digest(token, self._admin_token)
        if path in self._admin_paths and self._admin_token is not None:
            return admin
        return admin or self._token is None or hmac.compare_digest(token, self._token)


def _repeated(names: Sequence[bytes]) -> RequestError:
    """Return the error for the first header that is there more than once."""
    name = next(name for name in names if names.count(name) > 1).decode().title()
    return RequestError(f"the header {name} is there more than once: send it once", name)


def _is_json(content_type: bytes | None) -> bool:
    """Return whether a body may be JSON. A missing type counts as JSON: a browser that leaves it
    out still sends `Origin`."""
    if content_type is None:
        return True
    kind = content_type.partition(b";")[0].strip().lower()
    return kind == b"application/json" or (kind.startswith(b"application/") and kind.endswith(b"+json"))
