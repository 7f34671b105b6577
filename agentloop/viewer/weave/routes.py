"""The routes of weave's trace server that its client uses, under the paths of weave 0.54."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from agentloop.files import json_line
from agentloop.viewer.received import Received
from agentloop.viewer.weave import account, calls, feedback, files, objects, reading, refs, tables
from agentloop.web.bodies import read_object

Handler = Callable[[Received, dict[str, Any]], Any]

HANDLERS: Mapping[str, Handler] = {
    "/call/start": calls.start,
    "/call/end": calls.end,
    "/call/upsert_batch": calls.upsert_batch,
    "/call/update": calls.update,
    "/call/read": reading.read,
    "/calls/delete": calls.delete,
    "/calls/query_stats": reading.count,
    "/obj/create": objects.create,
    "/obj/read": objects.read,
    "/obj/delete": objects.delete,
    "/objs/query": objects.query,
    "/table/create": tables.create,
    "/table/create_from_digests": tables.create_from_digests,
    "/table/update": tables.update,
    "/table/query": tables.query,
    "/table/query_stats": tables.count,
    "/table/query_stats_batch": tables.count_several,
    "/refs/read_batch": refs.read_batch,
    "/files/query_stats": files.stored_bytes,
    "/feedback/create": feedback.create,
    "/feedback/batch/create": feedback.create_batch,
    "/feedback/replace": feedback.replace,
    "/feedback/purge": feedback.purge,
    "/feedback/query": feedback.query,
    "/cost/query": lambda _, __: {"results": []},
}
"""POST path -> what answers it, in a thread, with the JSON object of the body."""


def build_router(received: Received) -> APIRouter:
    """Return the routes of a store."""
    router = APIRouter()
    for path, handler in HANDLERS.items():
        router.add_api_route(path, _json_route(received, handler), methods=["POST"])
    _add_calls(router, received)
    _add_files(router, received)

    @router.get("/server_info")
    def server_info() -> dict[str, str]:
        return account.server_info()

    @router.post("/graphql")
    async def graphql(request: Request) -> Response:
        return _json(account.graphql(await read_object(request)))

    return router


def _json_route(received: Received, handler: Handler) -> Callable[[Request], Any]:
    async def route(request: Request) -> Response:
        body = await read_object(request)
        return _json(await run_in_threadpool(handler, received, body))

    return route


def _add_calls(router: APIRouter, received: Received) -> None:
    @router.post("/v2/{entity}/{project}/calls/complete")
    async def complete(entity: str, project: str, request: Request) -> Response:
        body = await read_object(request)
        return _json(await run_in_threadpool(calls.complete, received, f"{entity}/{project}", body))

    @router.post("/v2/{entity}/{project}/call/start")
    async def start(entity: str, project: str, request: Request) -> Response:
        body = _of_project(await read_object(request), "start", f"{entity}/{project}")
        return _json(await run_in_threadpool(calls.start, received, body))

    @router.post("/v2/{entity}/{project}/call/end")
    async def end(entity: str, project: str, request: Request) -> Response:
        body = _of_project(await read_object(request), "end", f"{entity}/{project}")
        return _json(await run_in_threadpool(calls.end, received, body))

    @router.post("/calls/stream_query")
    async def stream(request: Request) -> Response:
        body = await read_object(request)
        lines = await run_in_threadpool(reading.stream, received, body)
        return StreamingResponse(lines, media_type="application/jsonl")


def _add_files(router: APIRouter, received: Received) -> None:
    @router.post("/file/create")
    async def create(request: Request) -> Response:
        return _json(await files.create(received, request))

    @router.post("/file/content")
    async def content(request: Request) -> Response:
        body = await read_object(request)
        return await run_in_threadpool(files.content, received, body)


def _of_project(body: dict[str, Any], key: str, project: str) -> dict[str, Any]:
    if isinstance(body.get(key), dict):
        body[key]["project_id"] = project
    return body


def _json(value: Any) -> Response:
    return Response(json_line(value), media_type="application/json")
