"""The HTTP side: `POST /retrieve`, `/health`, `/metrics`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentloop.errors import AgentloopError
from agentloop.web.auth import Gate
from agentloop.web.bodies import read_object
from agentloop.web.refusals import Refusal, answer
from tools.search.server.batching import Overloaded
from tools.search.server.metrics import Metrics
from tools.search.server.service import Retrieval

MOST_QUERIES = 1024
MOST_QUERY_CHARACTERS = 10_000
MOST_TOPK = 1000
MOST_PASSAGES = 20_000
"""Passages of one answer: it is put together on the event loop."""
MOST_BODY_BYTES = 16 * 2**20

KEYS = ("queries", "topk", "return_scores")


def create_app(retrieval: Retrieval, *, token: str | None = None, topk: int = 3) -> FastAPI:
    """Return the application.

    Args:
        token: bearer token; None: only requests to the loopback address are answered.
        topk: passages of a query for requests that do not say.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await retrieval.close()

    app = FastAPI(title="agentloop search", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, token=token)
    app.add_middleware(_Counted, metrics=retrieval.metrics)
    app.add_exception_handler(Refusal, answer)
    app.add_exception_handler(AgentloopError, answer)

    @app.post("/retrieve")
    async def retrieve(request: Request) -> Response:
        queries, k, scores = read_request(await read_object(request, MOST_BODY_BYTES), topk)
        try:
            body = await retrieval.retrieve(queries, k, scores)
        except Overloaded:
            return Response(b'{"error":"too many queries wait"}', 503, {"Retry-After": "1"}, "application/json")
        return Response(body, media_type="application/json")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        retrieval.opened.corpus.check()
        return {"status": "ok", "passages": retrieval.opened.index.passages, "index": retrieval.opened.kind}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(retrieval.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


class _Counted:
    """ASGI middleware: counts the requests to /retrieve by status, refused ones too."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/retrieve":
            await self._app(scope, receive, send)
            return
        status, begin = 500, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            self._metrics.latency.observe(time.perf_counter() - begin)
            self._metrics.requests.labels(str(status)).inc()


def read_request(body: dict[str, Any], topk: int) -> tuple[list[str], int, bool]:
    """Return queries, passages of each, and whether scores are wanted.

    Raises:
        Refusal: 422, naming the field and what it may be.
    """
    unknown = [key for key in body if key not in KEYS]
    if unknown:
        raise Refusal(422, f"the field {unknown[0]!r} is not known", f"known fields: {', '.join(KEYS)}")

    queries = body.get("queries")
    if not isinstance(queries, list) or not queries or not all(isinstance(query, str) for query in queries):
        raise Refusal(422, "queries is not a list of texts", 'send {"queries": ["..."]}')
    if len(queries) > MOST_QUERIES:
        raise Refusal(422, f"queries has {len(queries)} texts", f"send at most {MOST_QUERIES} at once")
    longest = max(map(len, queries))
    if longest > MOST_QUERY_CHARACTERS:
        raise Refusal(422, f"a query has {longest} characters", f"at most {MOST_QUERY_CHARACTERS} are searched for")

    k = body.get("topk")
    k = topk if k is None else k
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MOST_TOPK:
        raise Refusal(422, f"topk is {repr(k)[:40]}", f"send a whole number from 1 to {MOST_TOPK}")
    if k * len(queries) > MOST_PASSAGES:
        raise Refusal(
            422, f"{len(queries)} queries with topk {k} are too many", f"at most {MOST_PASSAGES} passages in all"
        )
    scores = body.get("return_scores")
    if scores not in (None, True, False):
        raise Refusal(422, f"return_scores is {repr(scores)[:40]}", "send true or false")
    return queries, k, bool(scores)
