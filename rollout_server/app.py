"""The HTTP surface: SGLang's names, tokens only."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
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
    UpdateWeightsFromDiskRequest,
)
from rollout_server import AGENTLOOP_PACKAGE
from rollout_server.auth import BearerToken
from rollout_server.engines.base import EngineError, WeightsError
from rollout_server.errors import HttpError, bad_request, parse
from rollout_server.generate import GenerateEndpoint
from rollout_server.http import read_body
from rollout_server.metrics import Metrics
from rollout_server.router import Router
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

NOT_BUILT = (
    "/update_weights_from_tensor",
    "/init_weights_update_group",
    "/update_weights_from_distributed",
)
"""SGLang's names that this version answers with 501."""


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
    _add_admin(app, router, tuple(root.resolve() for root in settings.weights_roots))
    for path in NOT_BUILT:
        app.add_api_route(path, _not_built, methods=["POST"], response_model=ErrorBody, status_code=501)

    @app.exception_handler(HttpError)
    async def refuse(_: Request, exc: HttpError) -> Response:
        return _json(exc.body, exc.status)

    @app.exception_handler(EngineError)
    async def fail(_: Request, exc: EngineError) -> Response:
        return _json(HttpError(500, "engine_error", str(exc)).body, 500)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, exc: HTTPException) -> Response:
        kind = "not_found" if exc.status_code == 404 else "invalid_request"
        error = HttpError(exc.status_code, kind, f"{request.method} {request.url.path}: {exc.detail}")
        return _json(error.body, error.status)

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
        return _done("")

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
        return _done("")

    @app.get("/server_info", response_model=ServerInfo)
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
            incremental_streaming_output=settings.incremental_streaming_output,
        )
        await router.refresh()
        states = [
            {
                "name": member.replica.name,
                "state": member.state,
                "reason": member.reason,
                "weight_version": member.replica.weight_version,
                "in_flight": len(member.in_flight),
                "in_flight_tokens": member.in_flight_tokens,
                "fenced": member.fenced,
                **asdict(member.replica.stats()),
            }
            for member in router.members
        ]
        return _json(orjson.dumps({**body.model_dump(), "states": states}))

    @app.get("/model_info", response_model=dict[str, Any])
    @app.get("/get_model_info", response_model=dict[str, Any], include_in_schema=False)
    async def model_info() -> Response:
        """The facts that SGLang gives under this name."""
        facts = {"model_path": router.info.model_path, "is_generation": True, "weight_version": router.weight_version}
        return _json(orjson.dumps(facts))

    @app.get("/metrics", response_class=Response)
    async def read_metrics() -> Response:
        """Prometheus' text format."""
        await router.refresh()
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")


def _add_admin(app: FastAPI, router: Router, roots: tuple[Path, ...]) -> None:
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

    async def update(request: UpdateWeightsFromDiskRequest) -> str:
        """Serve the safetensors of a folder as a new version, from the next step on. A folder that does not hold this
        model's weights, whole, changes nothing. The prefixes that old weights computed are always forgotten,
        whatever `flush_cache` says."""
        folder = _allowed_folder(request.model_path, roots)
        if request.load_format not in (None, "auto", "safetensors"):
            raise bad_request("only safetensors are loaded", "load_format")
        if request.abort_all_requests:
            await router.abort()
        name = request.weight_version or folder.name
        try:
            await router.update_weights(folder, name)
        except WeightsError as exc:
            raise bad_request(str(exc), "model_path") from exc
        return f"serving version {name}"

    async def release(request: MemoryRequest) -> str:
        """Give the device's memory back: `weights`, `kv_cache`, or both. 409 where the engine cannot."""
        await router.memory("release", request.tags)
        return "released"

    async def occupy(request: MemoryRequest) -> str:
        """Take the memory again; weights come back with the next update."""
        await router.memory("resume", request.tags)
        return "resumed"

    _admin(app, "/abort_request", AbortRequest, abort)
    _admin(app, "/pause_generation", PauseRequest, pause)
    _admin(app, "/continue_generation", _Nothing, resume)
    _admin(app, "/flush_cache", _Nothing, flush)
    _admin(app, "/update_weights_from_disk", UpdateWeightsFromDiskRequest, update)
    _admin(app, "/release_memory_occupation", MemoryRequest, release)
    _admin(app, "/resume_memory_occupation", MemoryRequest, occupy)


class _Nothing(BaseModel):
    """A request without fields; those that SGLang knows are ignored."""


def _admin(app: FastAPI, path: str, model: type[Any], act: Callable[[Any], Awaitable[str]]) -> None:
    async def route(request: Request) -> Response:
        return _done(await act(parse(model, await read_body(request.scope, request.receive))))

    schema = {"requestBody": {"content": {"application/json": {"schema": model.model_json_schema()}}}}
    app.add_api_route(
        path, route, methods=["POST"], response_model=AdminResponse, description=act.__doc__, openapi_extra=schema,
        name=path.strip("/"), responses={status: {"model": ErrorBody} for status in (400, 401, 403, 409, 413, 500)},
    )  # fmt: skip


def _allowed_folder(path: str, roots: tuple[Path, ...]) -> Path:
    """The folder, if it is under a root; links are followed before it is judged."""
    try:
        folder = Path(path).resolve()
    except (OSError, ValueError, RuntimeError) as exc:
        raise bad_request(f"model_path is no path: {exc}", "model_path") from exc
    if not any(folder.is_relative_to(root) for root in roots):
        raise HttpError(403, "forbidden", f"{path} is not under a --weights-root of this server", "model_path")
    if not folder.is_dir():
        raise bad_request(f"there is no folder {path}", "model_path")
    return folder


async def _not_built(request: Request) -> Response:
    """Not built in this version."""
    raise HttpError(501, "not_implemented", f"{request.url.path} is not built yet; use /update_weights_from_disk")


def _done(message: str) -> Response:
    return _json(orjson.dumps({"success": True, "message": message}))


def _json(body: bytes, status: int = 200) -> Response:
    return Response(body, status, media_type="application/json")


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
