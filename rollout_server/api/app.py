"""The HTTP surface: SGLang's names, tokens only."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from agentloop.wire import (
    AbortRequest,
    AdminResponse,
    ErrorBody,
    GenerateRequest,
    GenerateResponse,
    MemoryRequest,
    PauseRequest,
    ServerInfo,
)
from rollout_server import AGENTLOOP_PACKAGE
from rollout_server.api.admin import add_admin, done, to_json
from rollout_server.api.auth import BearerToken
from rollout_server.api.generate import GenerateEndpoint
from rollout_server.api.metrics import Metrics
from rollout_server.api.weights import add_weights
from rollout_server.engines.base import (
    EngineError,
)
from rollout_server.errors import HttpError, bad_request
from rollout_server.router.router import Router
from rollout_server.settings import ServerSettings

HEALTH_GENERATE_TIMEOUT_S = 20.0

ADMIN_PATHS = frozenset(
    {
        "/abort_request", "/pause_generation", "/continue_generation", "/flush_cache", "/update_weights_from_disk",
        "/update_weights_from_tensor", "/init_weights_update_group", "/destroy_weights_update_group",
        "/update_weights_from_distributed", "/release_memory_occupation", "/resume_memory_occupation",
    }
)  # fmt: skip
"""What changes the server for everybody: an admin token of its own can be set for these."""


def build_app(router: Router, *, settings: ServerSettings) -> ASGIApp:
    """The whole ASGI application.

    Args:
        router: the replicas.
        settings: `weights_roots`, the folders under which `/update_weights_from_disk` may read, and the tokens.
    """
    app = FastAPI(title="agentloop rollout server", version=package_version(), docs_url=None, redoc_url=None)
    metrics = Metrics(router)
    endpoint = GenerateEndpoint(router, metrics, incremental=settings.incremental_streaming_output)
    app.router.routes.append(Route("/generate", endpoint, methods=["POST"]))  # for other methods, and the 405
    _add_reads(app, router, metrics, settings)
    _add_admin(app, router)
    add_weights(app, router, tuple(root.resolve() for root in settings.weights_roots))

    @app.exception_handler(HttpError)
    async def refuse(_: Request, exc: HttpError) -> Response:
        return to_json(exc.body, exc.status)

    @app.exception_handler(EngineError)
    async def fail(_: Request, exc: EngineError) -> Response:
        return to_json(HttpError(500, "engine_error", str(exc)).body, 500)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, exc: HTTPException) -> Response:
        kind = "not_found" if exc.status_code == 404 else "invalid_request"
        error = HttpError(exc.status_code, kind, f"{request.method} {request.url.path}: {exc.detail}")
        return to_json(error.body, error.status)

    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    served = _Shortcut(app, endpoint)
    if not settings.token and not settings.admin_token:
        return served
    return BearerToken(served, settings.token, settings.admin_token, ADMIN_PATHS)


class _Shortcut:
    """`POST /generate` past the framework, whose layers cost more than the request itself."""

    def __init__(self, app: ASGIApp, generate: ASGIApp) -> None:
        self._app = app
        self._generate = generate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/generate" and scope["method"] == "POST":
            await self._generate(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def package_version() -> str:
    """The installed version of the distribution."""
    try:
        return version(AGENTLOOP_PACKAGE)
    except PackageNotFoundError:
        return "0"


def _add_reads(app: FastAPI, router: Router, metrics: Metrics, settings: ServerSettings) -> None:
    @app.get("/health", response_model=AdminResponse)
    async def health() -> Response:
        """200 while the process serves."""
        if router.failure:
            raise HttpError(503, "engine_error", router.failure)
        return done("")

    @app.get("/health_generate", response_model=AdminResponse)
    async def health_generate() -> Response:
        """200 if every replica that serves samples a token in time, and one serves."""
        if not router.serving:
            raise HttpError(503, "engine_error", "no replica serves")
        try:
            async with asyncio.timeout(HEALTH_GENERATE_TIMEOUT_S):
                await asyncio.gather(*(member.replica.probe() for member in router.serving))
        except (EngineError, TimeoutError) as exc:
            raise HttpError(503, "engine_error", f"no token was sampled: {exc or 'timed out'}") from exc
        return done("")

    @app.get("/server_info", response_model=ServerInfo)
    @app.get("/get_server_info", response_model=ServerInfo, include_in_schema=False)
    async def server_info() -> Response:
        """What is served, and the engines' counters."""
        info = router.info
        body = ServerInfo(
            version=package_version(),
            engine=info.name,
            model_path=info.model_path,
            weight_version=router.weight_version,
            context_length=info.context_length,
            vocab_size=info.vocab_size,
            replicas=len(router.members),
            pid=os.getpid(),
            checksum=router.checksum,
            incremental_streaming_output=settings.incremental_streaming_output,
        )
        await router.refresh()
        states = [
            {
                "name": member.replica.name,
                "state": member.state,
                "reason": member.reason,
                "weight_version": member.replica.weight_version,
                "ranks": member.replica.ranks,
                "in_flight": len(member.in_flight),
                "in_flight_tokens": member.in_flight_tokens,
                "fenced": member.fenced,
                **asdict(member.replica.stats()),
            }
            for member in router.members
        ]
        return to_json(orjson.dumps({**body.model_dump(), "states": states}))

    @app.get("/model_info", response_model=dict[str, Any])
    @app.get("/get_model_info", response_model=dict[str, Any], include_in_schema=False)
    async def model_info() -> Response:
        """The facts that SGLang gives under this name."""
        facts = {"model_path": router.info.model_path, "is_generation": True, "weight_version": router.weight_version}
        return to_json(orjson.dumps(facts))

    @app.get("/metrics", response_class=Response)
    async def read_metrics() -> Response:
        """Prometheus' text format."""
        await router.refresh()
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")


def _add_admin(app: FastAPI, router: Router) -> None:
    async def abort(request: AbortRequest) -> str:
        """Abort one request, those of a session, or all; each is answered with what it has and finish reason
        `abort`."""
        if not request.rid and not request.session_id and not request.abort_all:
            raise bad_request("give the rid of a request, a session_id, or abort_all", "rid")
        if request.abort_all:
            return f"{await router.abort()} aborted"
        return f"{await router.abort(request.rid or None, request.session_id)} aborted"

    async def pause(request: PauseRequest) -> str:
        """Return when no step runs. Requests that run or come in wait; none is answered early, but for mode `abort`.
        Mode `wait` lets those that run end first."""
        await router.pause(request.mode)
        return "paused"

    async def resume(_: BaseModel) -> str:
        """Go on generating."""
        await router.resume()
        return "running"

    async def flush(_: BaseModel) -> str:
        """Forget the prefixes of finished requests."""
        await router.flush_cache()
        return "flushed"

    async def release(request: MemoryRequest) -> str:
        """Give the device's memory back: `weights`, `kv_cache`, or both. 409 where the engine cannot."""
        await router.memory("release", request.tags)
        return "released"

    async def occupy(request: MemoryRequest) -> str:
        """Take the memory again; weights come back with the next update."""
        await router.memory("resume", request.tags)
        return "resumed"

    add_admin(app, "/abort_request", AbortRequest, abort)
    add_admin(app, "/pause_generation", PauseRequest, pause)
    add_admin(app, "/continue_generation", _Nothing, resume)
    add_admin(app, "/flush_cache", _Nothing, flush)
    add_admin(app, "/release_memory_occupation", MemoryRequest, release)
    add_admin(app, "/resume_memory_occupation", MemoryRequest, occupy)


class _Nothing(BaseModel):
    """A request without fields; those that SGLang knows are ignored."""


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document with `/generate` added, whose route bypasses FastAPI."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        document["paths"]["/generate"] = {
            "post": {
                "summary": "Generate",
                "description": GenerateRequest.__doc__,
                "operationId": "generate",
                "requestBody": _content(GenerateRequest, "validation") | {"required": True},
                "responses": {
                    "200": {"description": GenerateResponse.__doc__, **_content(GenerateResponse, "serialization")},
                    **{
                        status: {"description": text, **_content(ErrorBody, "serialization")}
                        for status, text in (
                            ("400", "bad request"),
                            ("401", "no token"),
                            ("413", "too large"),
                            ("500", "engine failed"),
                            ("503", "queue full"),
                        )
                    },
                },
            }
        }
        app.openapi_schema = document
    return app.openapi_schema


def _content(model: type[BaseModel], mode: Any) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": model.model_json_schema(mode=mode)}}}
