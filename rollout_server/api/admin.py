"""How an administrative route is added: strict JSON in, `{success, message, ...}` out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response

from agentloop.wire import AdminResponse, ErrorBody
from rollout_server.api.asgi import read_body
from rollout_server.errors import parse


def add_admin(
    app: FastAPI,
    path: str,
    model: type[Any],
    act: Callable[[Any], Awaitable[str]] | Callable[[Any], Awaitable[dict[str, Any]]],
) -> None:
    """Add a route; what `act` returns is the answer's message, or its fields."""

    async def route(request: Request) -> Response:
        answer = await act(parse(model, await read_body(request.scope, request.receive)))
        return done(answer) if isinstance(answer, str) else to_json(orjson.dumps({"success": True, **answer}))

    schema = {"requestBody": {"content": {"application/json": {"schema": model.model_json_schema()}}}}
    app.add_api_route(
        path, route, methods=["POST"], response_model=AdminResponse, description=act.__doc__, openapi_extra=schema,
        name=path.strip("/"), responses={status: {"model": ErrorBody} for status in (400, 401, 403, 409, 413, 500)},
    )  # fmt: skip


def done(message: str) -> Response:
    """200, with a message."""
    return to_json(orjson.dumps({"success": True, "message": message}))


def to_json(body: bytes, status: int = 200) -> Response:
    """JSON that is encoded already."""
    return Response(body, status, media_type="application/json")
