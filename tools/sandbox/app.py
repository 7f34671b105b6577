"""The HTTP API: `/run_code` as Sandbox Fusion answers it, sessions, `/health` and `/metrics`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ValidationError

from agentloop.errors import AgentloopError, ToolError
from agentloop.web.auth import Gate
from agentloop.web.bodies import read_body
from agentloop.web.refusals import Refusal
from agentloop.web.refusals import answer as refused
from tools.sandbox.isolation.bubblewrap import Bubblewrap
from tools.sandbox.messages import (
    CloseRequest,
    RenewRequest,
    RunCodeAnswer,
    RunCodeRequest,
    RunStatus,
    SessionAnswer,
    SessionRequest,
    misnamed_field,
)
from tools.sandbox.messages import (
    Request as SandboxRequest,
)
from tools.sandbox.pool import QueueFull
from tools.sandbox.runner import Runner, WrongRequest
from tools.sandbox.sessions import NoSuchSession, Sessions, TooManySessions
from tools.sandbox.settings import SandboxSettings

Model = TypeVar("Model", bound=SandboxRequest)
Found = TypeVar("Found")

MOST_BODY = 32 * 2**20
"""Bytes of a request."""

RETRY_AFTER_S = "1"


class _Metrics:
    def __init__(self, runner: Runner, sessions: Sessions) -> None:
        self.registry = CollectorRegistry()
        self.programs = Counter(
            "sandbox_programs", "Programs and cells by language and outcome", ["language", "outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram("sandbox_seconds", "Seconds from request to answer", registry=self.registry)
        for name, text, value in (
            ("sandbox_running", "Programs that run", lambda: runner.pool.running),
            ("sandbox_queued", "Programs that wait", lambda: runner.pool.queued),
            ("sandbox_idle", "Sandboxes that wait for a program", lambda: runner.pool.idle),
            ("sandbox_live", "Sandboxes that exist", lambda: runner.pool.live),
            ("sandbox_sessions", "Open sessions", lambda: len(sessions)),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)


def create_app(settings: SandboxSettings, launcher: Bubblewrap, token: str | None = None) -> FastAPI:
    """Return the server's application; its sandboxes start and end with its lifespan."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runner = app.state.runner = Runner(settings, launcher)
        sessions = app.state.sessions = Sessions(runner)
        app.state.metrics = _Metrics(runner, sessions)
        runner.pool.fill()
        try:
            yield
        finally:
            await sessions.close_all()
            await runner.close()

    app = FastAPI(title="agentloop sandbox", lifespan=lifespan)
    app.add_middleware(Gate, token=token)
    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(AgentloopError, refused)
    _add_programs(app)
    _add_sessions(app)
    _add_state(app)
    return app


def _add_programs(app: FastAPI) -> None:
    @app.post("/run_code", response_model=RunCodeAnswer, openapi_extra=_body(RunCodeRequest))
    async def run_code(request: Request) -> Response:
        """Run one program in a sandbox of its own, or a cell in a session."""
        wanted = await _read(request, RunCodeRequest)
        runner: Runner = request.app.state.runner
        if wanted.session_id is not None:
            sessions: Sessions = request.app.state.sessions
            name = wanted.session_id
            return await _answered(request, "session", lambda: sessions.run(name, wanted))
        return await _answered(request, wanted.language, lambda: _unless_gone(request, runner.run(wanted)))


def _add_sessions(app: FastAPI) -> None:
    @app.post("/sessions", response_model=SessionAnswer, openapi_extra=_body(SessionRequest))
    async def open_session(request: Request) -> Response:
        """Open a session: a process that keeps its variables between cells."""
        wanted = await _read(request, SessionRequest)
        sessions: Sessions = request.app.state.sessions
        try:
            opened = await _unless_gone(
                request, sessions.open(wanted), undo=lambda opened: sessions.close(opened.session_id)
            )
        except asyncio.CancelledError:
            return _busy("the server is ending", "send it again to the next one")
        except WrongRequest as exc:
            raise Refusal(400, str(exc), exc.fix) from exc
        except TooManySessions:
            return _busy("as many sessions are open as this server allows", "--max-sessions")
        except ToolError as exc:
            return _busy(exc.message, "see the server's log")
        return _json(opened)

    @app.post("/renew_sessions", openapi_extra=_body(RenewRequest))
    async def renew_sessions(request: Request) -> Response:
        """Begin the leases of sessions anew: their clients live, though they call nothing."""
        wanted = await _read(request, RenewRequest)
        return JSONResponse({"renewed": request.app.state.sessions.renew(wanted.session_ids)})

    @app.post("/close_session", openapi_extra=_body(CloseRequest))
    async def close_session(request: Request) -> Response:
        """End a session, and what runs in it. One that has ended already is closed too."""
        wanted = await _read(request, CloseRequest)
        with contextlib.suppress(NoSuchSession):
            await request.app.state.sessions.close(wanted.session_id)
        return JSONResponse({"closed": True})


def _add_state(app: FastAPI) -> None:
    @app.get("/health")
    async def health(request: Request) -> Response:
        """Return what the server runs, and whether it isolates it."""
        runner: Runner = request.app.state.runner
        return JSONResponse(
            {
                "status": "ok",
                "sandboxed": runner.sandboxed,
                "cgroups": runner.limited_by_cgroups,
                "languages": sorted({language.name for language in runner.languages.values()}),
                "running": runner.pool.running,
                "queued": runner.pool.queued,
                "idle": runner.pool.idle,
                "sessions": len(request.app.state.sessions),
            }
        )

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Return Prometheus metrics."""
        return Response(generate_latest(request.app.state.metrics.registry), media_type="text/plain; version=0.0.4")


async def _unless_gone(
    request: Request, run: Coroutine[Any, Any, Found], undo: Callable[[Found], Awaitable[None]] | None = None
) -> Found:
    """Run a program, or open a session, until its client goes away: one that was killed leaves
    nothing behind.

    Cells of sessions go on, up to their time limit: a client that has lost its connection asks for
    their answer again.

    Args:
        undo: called with what was found for a client that has gone meanwhile.

    Raises:
        asyncio.CancelledError: the client has gone.
    """
    running = asyncio.create_task(run)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({running, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            running.cancel()
        found = await running
        if undo is not None and gone.done():
            await undo(found)
        return found
    finally:
        for task in (running, gone):
            task.cancel()
        await asyncio.gather(running, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answered(request: Request, language: str, run: Callable[[], Awaitable[RunCodeAnswer]]) -> Response:
    """Run, and turn what can go wrong into answers."""
    metrics: _Metrics = request.app.state.metrics
    started = time.monotonic()
    outcome = "refused"
    try:
        found = await run()
        outcome = found.status
        return _json(found)
    except WrongRequest as exc:
        raise Refusal(400, str(exc), exc.fix) from exc
    except NoSuchSession:
        # Not a 404, which a wrong address gives: the client can open another.
        text = "there is no such session: it has ended; open another with POST /sessions"
        return _json(RunCodeAnswer(status=RunStatus.SANDBOX_ERROR, message=text, session_ended=True))
    except asyncio.CancelledError:
        # The client has gone, or the server ends and gives up requests that take too long for that.
        return _busy("the server is ending", "send it again to the next one")
    except QueueFull:
        return _busy("as many programs wait as this server allows", "--max-queue")
    except ToolError as exc:
        outcome = RunStatus.SANDBOX_ERROR
        return _busy(exc.message, "see the server's log")
    finally:
        known = request.app.state.runner.languages
        label = known[language].name if language in known else language if language == "session" else "other"
        metrics.programs.labels(label, outcome).inc()
        metrics.seconds.observe(time.monotonic() - started)


async def _read(request: Request, model: type[Model]) -> Model:
    """Read a request's body.

    Raises:
        Refusal: it is too large, or does not have the fields of `model`; or one that is like them.
    """
    try:
        found = model.model_validate_json(await read_body(request, MOST_BODY))
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise Refusal(422, f"{place or 'the body'}: {first['msg']}", "see /openapi.json") from None
    wrong = misnamed_field(found)
    if wrong is not None:
        raise Refusal(422, f"the field {wrong[0][:80]!r} is not known", f"{wrong[1]}; see /openapi.json")
    return found


def _busy(message: str, option: str) -> Response:
    fix = f"send it again later; the server's option is {option}" if option.startswith("--") else option
    body = {"error": message, "fix": fix, "status": RunStatus.SANDBOX_ERROR, "message": message}
    return JSONResponse(body, 503, {"Retry-After": RETRY_AFTER_S})


def _json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")


def _body(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
