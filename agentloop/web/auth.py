"""Who may use a server: the holder of its token, and no web page of another origin.

On the loopback address no token is needed. A web page can send requests to a server on the reader's
own machine; browsers name that page in `Origin` and `Sec-Fetch-Site`, which it cannot change. A
page that points its own name at this machine (DNS rebinding) is recognized by `Host`. Following a
link from elsewhere is allowed: the page that holds the link learns nothing from it.

With a token, a client sends it as `Authorization: Bearer`, or as the password of `Basic`, as
weave's client sends its API key. A browser gives it once as `?token=`, and keeps it as a cookie.
"""

from __future__ import annotations

import base64
import hmac
import re
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentloop.config.server import LOOPBACK
from agentloop.web.refusals import Refusal

COOKIE = "agentloop_trace_token"

OPEN_PATHS = ("/health",)
"""Answered without a token, for liveness probes."""

BODY_TYPES = frozenset(
    {
        "application/json", "application/x-protobuf", "application/protobuf", "multipart/form-data",
        "application/octet-stream", "application/x-www-form-urlencoded",
    }
)  # fmt: skip
"""What a request with a body may hold. `text/plain` is refused, as nothing that is served needs it;
a web page could send that and the last three to another origin, but only beside its `Origin`."""

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Sent with every answer. Text of models and tools is shown in these pages: no script but the
server's own may run, whatever that text holds, and browsers refuse to parse text as HTML at all."""

_NAME = re.compile(r"(\[[^]]*\]|[^:]*)(:\d*)?")
_LOOPBACK_V4 = re.compile(r"127(\.\d{1,3}){3}")


def is_loopback(host: str) -> bool:
    """Return whether `host` names this machine's loopback address."""
    name = host.lower().strip("[]")
    return name in LOOPBACK or _LOOPBACK_V4.fullmatch(name) is not None


class Gate:
    """ASGI middleware: 401 without the token, 403 for web pages of another origin.

    Args:
        token: opens every path; None: all are open, and `Host` must name the loopback address.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = token.encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal.response(scope, receive, guarded)
        elif (page := self._without_token(scope)) is not None:
            await page(scope, receive, guarded)
        else:
            await self._app(scope, receive, guarded)

    def _refusal(self, scope: Scope, headers: Headers) -> Refusal | None:
        host = headers.get("host", "").lower()
        origin = headers.get("origin")
        if origin is not None and (not host or origin.lower().partition("://")[2] != host):
            return Refusal(403, "a web page of another origin may not use this server", "send no Origin header")
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not _follows_link(scope, headers):
            return Refusal(403, "a web page of another site may not use this server")
        if self._token is None and host and not _is_this_machine(host):
            return Refusal(
                403,
                "without a token, this server answers only requests to 127.0.0.1, localhost or ::1",
                "use one of these names in the URL, or start the server with --token-file",
            )
        if not self._opens(scope, headers):
            return Refusal(
                401,
                "send this server's token in the Authorization header",
                "open the URL with ?token= that the server printed, or send Authorization: Bearer",
            )
        kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if scope["method"] not in ("GET", "HEAD") and kind not in BODY_TYPES:
            return Refusal(415, f"a body of type {kind!r} is not supported", "send Content-Type: application/json")
        return None

    def _opens(self, scope: Scope, headers: Headers) -> bool:
        if self._token is None or scope["path"] in OPEN_PATHS:
            return True
        candidates = [_given(headers.get("authorization", "")), _cookie(headers.get("cookie", ""))]
        if scope["method"] == "GET":
            candidates.append(dict(_query(scope)).get("token", ""))
        # Compare in constant time: the duration must not reveal how much of the token was right.
        return any([hmac.compare_digest(candidate.encode(), self._token) for candidate in candidates])

    def _without_token(self, scope: Scope) -> RedirectResponse | None:
        """Return a redirect that moves the token from the address into a cookie, if it is there."""
        query = _query(scope)
        token = dict(query).get("token", "")
        if scope["method"] != "GET" or self._token is None or not hmac.compare_digest(token.encode(), self._token):
            return None
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        # One slash: an address that starts with two would lead to another host.
        page = RedirectResponse("/" + scope["path"].lstrip("/") + (f"?{rest}" if rest else ""), 303)
        page.set_cookie(COOKIE, token, httponly=True, samesite="lax", path="/", secure=scope["scheme"] == "https")
        return page


def _follows_link(scope: Scope, headers: Headers) -> bool:
    """Return whether a browser opens a page of this server by itself, not within another page."""
    return (
        scope["method"] == "GET"
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    )


def _is_this_machine(host: str) -> bool:
    match = _NAME.fullmatch(host)
    return match is not None and is_loopback(match[1])


def _query(scope: Scope) -> list[tuple[str, str]]:
    return parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)


def _given(authorization: str) -> str:
    """Return the token of an `Authorization` header, or an empty text."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
    except ValueError:  # not base64, not ASCII, or not UTF-8
        return ""


def _cookie(header: str) -> str:
    try:
        morsel = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel is not None else ""
