"""The ASGI application: all routes, error answers, and the OpenAPI document."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from agentloop.config.server import ServerSettings
from agentloop.wire import (
    AbortRequest,
    AdminResponse,
    ErrorBody,
    GenerateRequest,
    GenerateResponse,
    MemoryRequest,
    PauseRequest,
    ServerInfo,
    WireModel,
)
from rollout_server import AGENTLOOP_PACKAGE
from rollout_server.api.admin import add_admin, done, refused, to_json
from rollout_server.api.asgi import UntilStopped
from rollout_server.api.auth import Gate
from rollout_server.api.generate import GenerateEndpoint
from rollout_server.api.metrics import Metrics
from rollout_server.api.weights import add_weights
from rollout_server.engines.base import FolderWeights
from rollout_server.errors import Conflict, EngineError, ErrorAnswer, NotServing, RequestError, ServingError, answer_to
from rollout_server.router.fleet import Fleet
from rollout_server.router.members import Member
from rollout_server.router.router import Router

HEALTH_GENERATE_TIMEOUT_S = 20.0

ADMIN_PATHS = frozenset(
    {
        "/abort_request", "/pause_generation", "/continue_generation", "/flush_cache", "/update_weights_from_disk",
        "/update_weights_from_tensor", "/init_weights_update_group", "/destroy_weights_update_group",
        "/update_weights_from_distributed", "/release_memory_occupation", "/resume_memory_occupation",
        "/begin_weight_update", "/end_weight_update", "/update_weight_version", "/scale_replicas",
    }
)  # fmt: skip
"""Paths that change the server for all clients: a separate admin token can be required for them."""


def build_app(router: Router, fleet: Fleet | None = None, *, settings: ServerSettings) -> ASGIApp:
    """Build the whole ASGI application.

    Args:
        router: the replicas.
        fleet: starts and ends them; None: the engine is in this process.
        settings: `weights_roots` (folders under which weights may be read), the form of streams,
            and the tokens.

    Raises:
        ConfigError: a token's variable is named but not set.
    """
    app = FastAPI(title="agentloop rollout server", version=package_version(), docs_url=None, redoc_url=None)
    metrics = Metrics(router)
    endpoint = GenerateEndpoint(router, metrics, settings)
    app.router.routes.append(Route("/generate", endpoint, methods=["POST", "PUT"]))  # for other methods, and the 405
    _add_reads(app, router, metrics, settings)
    _add_admin(app, router)
    _add_scaling(app, router, fleet, settings)
    add_weights(app, router, tuple(root.resolve() for root in settings.weights_roots))

    @app.exception_handler(ServingError)
    async def refuse(_: Request, exc: ServingError) -> Response:
        return refused(answer_to(exc))

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, exc: HTTPException) -> Response:
        kind = "not_found" if exc.status_code == 404 else "invalid_request"
        return refused(ErrorAnswer(exc.status_code, kind, f"{request.method} {request.url.path}: {exc.detail}"))

    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's documented way
    return Gate(
        UntilStopped(_Shortcut(app, endpoint)), settings.token, settings.admin_token, ADMIN_PATHS, settings.host
    )


class _Shortcut:
    """Routes `POST /generate` around the framework, whose layers cost more than the request."""

    def __init__(self, app: ASGIApp, generate: ASGIApp) -> None:
        self._app = app
        self._generate = generate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/generate" and scope["method"] in ("POST", "PUT"):
            await self._generate(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def package_version() -> str:
    """Return the installed version of the distribution."""
    try:
        return version(AGENTLOOP_PACKAGE)
    except PackageNotFoundError:
        return "0"


def _add_reads(app: FastAPI, router: Router, metrics: Metrics, settings: ServerSettings) -> None:
    @app.get("/health", response_model=AdminResponse)
    async def health() -> Response:
        """200 while the process serves."""
        if router.failure:
            raise NotServing(router.failure)
        return done("")

    @app.get("/health_generate", response_model=AdminResponse)
    async def health_generate() -> Response:
        """200 if a replica serves, and every serving replica samples a token in time."""
        serving = router.members.serving
        if not serving:
            raise NotServing("no replica serves")
        try:
            async with asyncio.timeout(HEALTH_GENERATE_TIMEOUT_S):
                await asyncio.gather(*(member.started.probe() for member in serving))
        except (EngineError, TimeoutError) as exc:
            raise NotServing(f"no token was sampled: {exc or 'timed out'}") from exc
        return done("")

    @app.get("/server_info", response_model=ServerInfo)
    @app.get("/get_server_info", response_model=ServerInfo, include_in_schema=False)
    async def server_info() -> Response:
        """Facts about the server and its model, and each replica's state and counters."""
        info = router.info
        body = ServerInfo(
            version=package_version(),
            engine=info.name,
            model_path=info.model_path,
            weight_version=router.weights.version,
            context_length=info.context_length,
            vocab_size=info.vocab_size,
            replicas=len(router.members),
            pid=os.getpid(),
            checksum=router.weights.checksum,
            incremental_streaming_output=settings.incremental_streaming_output,
            keeps_images=info.images,
        )
        await router.refresh()
        states = [_state(member) for member in router.members]
        return to_json(orjson.dumps({**body.model_dump(), "states": states}))

    @app.get("/model_info", response_model=dict[str, Any])
    @app.get("/get_model_info", response_model=dict[str, Any], include_in_schema=False)
    async def model_info() -> Response:
        """Facts about the model, under SGLang's name for them."""
        source = router.weights.source
        facts = {
            "model_path": str(source.folder) if isinstance(source, FolderWeights) else router.info.model_path,
            "is_generation": True,
            "weight_version": router.weights.version,
        }
        return to_json(orjson.dumps(facts))

    @app.get("/get_weight_version", response_model=dict[str, Any])
    async def weight_version() -> Response:
        """The version that every serving replica serves."""
        return to_json(orjson.dumps({"weight_version": router.weights.version}))

    @app.get("/v1/loads", response_model=dict[str, Any])
    async def loads() -> Response:
        """Requests and tokens in flight of each replica, under SGLang's names."""
        await router.refresh()
        return to_json(orjson.dumps({"version": package_version(), "loads": [_load(m) for m in router.members]}))

    @app.get("/metrics", response_class=Response)
    async def read_metrics() -> Response:
        """Metrics in Prometheus' text format."""
        await router.refresh()
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")


def _state(member: Member) -> dict[str, Any]:
    return {
        "name": member.name,
        "state": member.state,
        "reason": member.reason,
        "weight_version": member.weight_version,
        "ranks": member.ranks,
        "in_flight": len(member.in_flight),
        "in_flight_tokens": member.in_flight_tokens,
        "fenced": member.fenced,
        **asdict(member.stats()),
    }


def _load(member: Member) -> dict[str, Any]:
    stats, in_flight = member.stats(), len(member.in_flight)
    waiting = min(stats.waiting, in_flight)
    return {
        "replica": member.name,
        "num_running_reqs": in_flight - waiting,
        "num_waiting_reqs": waiting,
        "num_total_reqs": in_flight,
        "num_used_tokens": stats.kv_tokens,
        "max_total_num_tokens": stats.kv_tokens_max,
        "weight_version": member.weight_version,
    }


def _add_admin(app: FastAPI, router: Router) -> None:
    async def abort(request: AbortRequest) -> str:
        """Abort one request, those of a session, or all. Each is answered with the tokens sampled
        so far and finish reason `abort`."""
        if not request.rid and not request.session_id and not request.abort_all:
            raise RequestError("give the rid of a request, a session_id, or abort_all", "rid")
        if request.abort_all:
            return f"{await router.abort()} aborted"
        return f"{await router.abort(request.rid or None, request.session_id)} aborted"

    async def pause(request: PauseRequest) -> str:
        """Stop sampling; answered once no step runs. Running and new requests wait for
        /continue_generation. Mode `abort` answers running requests at once, mode `wait` lets them
        finish first."""
        await router.pause(request.mode)
        return "paused"

    async def resume(_: BaseModel) -> str:
        """Continue sampling after a pause."""
        await router.resume()
        return "running"

    async def flush(_: BaseModel) -> str:
        """Drop the cached prefixes of finished requests."""
        await router.flush_cache()
        return "flushed"

    async def release(request: MemoryRequest) -> str:
        """Release device memory: `weights`, `kv_cache`, or both. 409 if the engine cannot."""
        await router.memory("release", request.tags)
        return "released"

    async def occupy(request: MemoryRequest) -> str:
        """Allocate device memory again; weights return with the next update."""
        await router.memory("resume", request.tags)
        return "resumed"

    add_admin(app, "/abort_request", AbortRequest, abort)
    add_admin(app, "/pause_generation", PauseRequest, pause)
    add_admin(app, "/continue_generation", _Nothing, resume)
    add_admin(app, "/flush_cache", _Nothing, flush, get=True)
    add_admin(app, "/release_memory_occupation", MemoryRequest, release, get=True)
    add_admin(app, "/resume_memory_occupation", MemoryRequest, occupy, get=True)


def _add_scaling(app: FastAPI, router: Router, fleet: Fleet | None, settings: ServerSettings) -> None:
    async def scale(request: ScaleRequest) -> dict[str, Any]:
        """Have this many replicas from now on; answered before new ones serve (see `/server_info`).
        Requests of those that leave go to the others. 409 if the engine is in the server's own
        process, or the replicas are given by their URLs."""
        if fleet is None:
            raise Conflict("the engine is in the server's own process: start it with 2 replicas or more", "replicas")
        await fleet.scale(request.replicas)
        router.limit(settings.most_in_flight(request.replicas))
        return {"message": f"{request.replicas} replicas", "replicas": request.replicas}

    add_admin(app, "/scale_replicas", ScaleRequest, scale)


class ScaleRequest(WireModel):
    """Start or end replicas, until there are this many."""

    replicas: int = Field(ge=1, le=1024)


class _Nothing(BaseModel):
    """A request without fields; fields of SGLang are ignored."""


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return FastAPI's document with `/generate` added, which bypasses FastAPI."""
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
                            ("400", "the request is wrong"),
                            ("401", "the token is missing or wrong"),
                            ("413", "the body is too large"),
                            ("500", "the engine failed"),
                            ("503", "the queue is full"),
                        )
                    },
                },
            }
        }
        app.openapi_schema = document
    return app.openapi_schema


def _content(model: type[BaseModel], mode: Any) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": model.model_json_schema(mode=mode)}}}
