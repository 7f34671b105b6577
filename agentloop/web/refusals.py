"""Why a request is refused, as an exception and as a JSON answer."""

from __future__ import annotations

import orjson
from starlette.requests import Request
from starlette.responses import Response

from agentloop.errors import AgentloopError


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status code.
        message: what is wrong, naming the field or the header.
        hint: how to fix it.
    """

    def __init__(self, status: int, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.hint = hint

    @property
    def response(self) -> Response:
        """The answer. `detail` and `reason` repeat the message: weave's client reads these keys."""
        body = {"error": self.message, "fix": self.hint, "detail": self.message, "reason": self.message}
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else None
        return Response(orjson.dumps(body), self.status, headers, "application/json")


async def answer(_: Request, exc: Exception) -> Response:
    """Answer a `Refusal` or an `AgentloopError` that a route raised; an exception handler."""
    if isinstance(exc, AgentloopError):
        exc = Refusal(500, exc.message, exc.hint)
    assert isinstance(exc, Refusal)
    return exc.response
