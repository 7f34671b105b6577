"""Administrative routes: strict JSON in, `{success, message, ...}` out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response

from agentloop.wire import AdminResponse, ErrorBody
from rollout_server.api.asgi import read_body
from rollout_server.api.parsing import parse
from rollout_server.errors import ErrorAnswer


def add_admin(
    app: FastAPI,
    path: str,
    model: type[Any],
    act: Callable[[Any], Awaitable[str]] | Callable[[Any], Awaitable[dict[str, Any]]],
    *,
    get: bool = False,
) -> None:
    """Add a route.

    Args:
        model: the request's message.
        act: performs the request; returns the answer's message, or its fields. Its docstring is the
            description.
        get: also answer GET, as SGLang does for this path.
    """

    async def route(request: Request) -> Response:
        answer = await act(parse(model, await read_body(request.scope, request.receive)))
        return done(answer) if isinstance(answer, str) else to_json(orjson.dumps({"success": True, **answer}))

    schema = {"requestBody": {"content": {"application/json": {"schema": model.model_json_schema()}}}}
    app.add_api_route(
        path, route, methods=["POST"], response_model=AdminResponse, description=act.__doc__, openapi_extra=schema,
        name=path.strip("/"), responses={status: {"model": ErrorBody} for status in (400, 401, 403, 409, 413, 500)},
    )  # fmt: skip
    if get:
        app.add_api_route(path, route, methods=["GET"], include_in_schema=False)


def done(message: str) -> Response:
    """Return a 200 with a message."""
    return to_json(orjson.dumps({"success": True, "message": message}))


def refused(answer: ErrorAnswer) -> Response:
    """Return the response to an error."""
    return Response(answer.body, answer.status, answer.headers, media_type="application/json")


def to_json(body: bytes) -> Response:
    """Return a 200 with encoded JSON."""
    return Response(body, media_type="application/json")
