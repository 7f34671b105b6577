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
from starlette.types import ASGIApp

from agentloop.wire import (
    AbortRequest,
    AdminResponse,
    ErrorBody,
    GenerateRequest,
    GenerateResponse,
    PauseRequest,
    SamplingParams,
    ServerInfo,
    UpdateWeightsFromDiskRequest,
)
from rollout_server import AGENTLOOP_PACKAGE
from rollout_server.auth import BearerToken
from rollout_server.engines.base import EngineError, Generation, WeightsError
from rollout_server.errors import HttpError, bad_request, parse
from rollout_server.generate import GenerateEndpoint
from rollout_server.http import MAX_BODY_BYTES
from rollout_server.metrics import Metrics
from rollout_server.router import Router

HEALTH_GENERATE_TIMEOUT_S = 20.0

NOT_BUILT = (
    "/update_weights_from_tensor",
    "/init_weights_update_group",
    "/update_weights_from_distributed",
    "/release_memory_occupation",
    "/resume_memory_occupation",
)
"""SGLang's names that this version answers with 501."""


def build_app(router: Router, *, weights_roots: tuple[Path, ...] = (), token: str | None = None) -> ASGIApp:
    """The whole ASGI application.

    Args:
        router: the replicas.
        weights_roots: folders under which `/update_weights_from_disk` may read.
        token: bearer token that every request but `/health` has to carry.
    """
    app = FastAPI(title="agentloop rollout server", version=package_version(), docs_url=None, redoc_url=None)
    metrics = Metrics(router)
    endpoint = GenerateEndpoint(router, metrics)
    app.router.routes.append(Route("/generate", endpoint, methods=["POST"]))
    _add_reads(app, router, metrics)
    _add_admin(app, router, tuple(root.resolve() for root in weights_roots))
    for path in NOT_BUILT:
        app.add_api_route(path, _not_built, methods=["POST"], response_model=ErrorBody, status_code=501)

    @app.exception_handler(HttpError)
    async def refuse(_: Request, exc: HttpError) -> Response:
        return _json(exc.body, exc.status)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, exc: HTTPException) -> Response:
        kind = "not_found" if exc.status_code == 404 else "invalid_request"
        error = HttpError(exc.status_code, kind, f"{request.method} {request.url.path}: {exc.detail}")
        return _json(error.body, error.status)

    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return BearerToken(app, token) if token else app


def package_version() -> str:
    """The installed version of the distribution."""
    try:
        return version(AGENTLOOP_PACKAGE)
    except PackageNotFoundError:
        return "0"


def _add_reads(app: FastAPI, router: Router, metrics: Metrics) -> None:
    @app.get("/health", response_model=AdminResponse)
    async def health() -> Response:
        """200 while the process serves."""
        if router.failure:
            raise HttpError(503, "engine_error", router.failure)
        return _done("")

    @app.get("/health_generate", response_model=AdminResponse)
    async def health_generate() -> Response:
        """200 if every replica samples a token in time."""
        probe = Generation("health", [0], SamplingParams(max_new_tokens=1, temperature=0.0))
        try:
            async with asyncio.timeout(HEALTH_GENERATE_TIMEOUT_S):
                await asyncio.gather(*(replica.generate(probe) for replica in router.replicas))
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
            replicas=len(router.replicas),
            pid=os.getpid(),
        )
        states = [{"name": replica.name, **asdict(replica.stats())} for replica in router.replicas]
        return _json(orjson.dumps({**body.model_dump(), "states": states}))

    @app.get("/metrics", response_class=Response)
    async def read_metrics() -> Response:
        """Prometheus' text format."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")


def _add_admin(app: FastAPI, router: Router, roots: tuple[Path, ...]) -> None:
    async def abort(request: AbortRequest) -> str:
        """Abort one request, or all; each is answered with what it has and finish reason `abort`."""
        if not request.rid and not request.abort_all:
            raise bad_request("give the rid of a request, or abort_all", "rid")
        return f"{await router.abort(None if request.abort_all else request.rid)} aborted"

    async def pause(request: PauseRequest) -> str:
        """Return when no step runs. Requests that run or come in wait; none is answered early, but for mode `abort`."""
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
            await router.abort(None)
        try:
            await router.update_weights(folder, request.weight_version)
        except WeightsError as exc:
            raise bad_request(str(exc), "model_path") from exc
        return f"serving version {request.weight_version}"

    _admin(app, "/abort_request", AbortRequest, abort)
    _admin(app, "/pause_generation", PauseRequest, pause)
    _admin(app, "/continue_generation", _Nothing, resume)
    _admin(app, "/flush_cache", _Nothing, flush)
    _admin(app, "/update_weights_from_disk", UpdateWeightsFromDiskRequest, update)


class _Nothing(BaseModel):
    """A request without fields; those that SGLang knows are ignored."""


def _admin(app: FastAPI, path: str, model: type[Any], act: Callable[[Any], Awaitable[str]]) -> None:
    async def route(request: Request) -> Response:
        if int(request.headers.get("content-length") or 0) > MAX_BODY_BYTES:
            raise HttpError(413, "too_large", f"the body is larger than {MAX_BODY_BYTES} bytes")
        try:
            return _done(await act(parse(model, await request.body())))
        except EngineError as exc:
            raise HttpError(500, "engine_error", str(exc)) from exc

    schema = {"requestBody": {"content": {"application/json": {"schema": model.model_json_schema()}}}}
    app.add_api_route(
        path, route, methods=["POST"], response_model=AdminResponse, description=act.__doc__, openapi_extra=schema,
        name=path.strip("/"), responses={400: {"model": ErrorBody}, 500: {"model": ErrorBody}},
    )  # fmt: skip


def _allowed_folder(path: str, roots: tuple[Path, ...]) -> Path:
    """The folder, if it is under a root; links are followed before it is judged."""
    folder = Path(path).resolve()
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
                        for status, text in (("400", "bad request"), ("413", "too large"), ("500", "engine failed"))
                    },
                },
            }
        }
        app.openapi_schema = document
    return app.openapi_schema


def _content(model: type[BaseModel], mode: Any) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": model.model_json_schema(mode=mode)}}}
