"""The ASGI application of the trace server: its routers, and who may use them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from agentloop.errors import AgentloopError
from agentloop.viewer import external, otlp, weave
from agentloop.viewer.api import build_router
from agentloop.viewer.api.run import is_run
from agentloop.viewer.received import Received
from agentloop.web.auth import Gate
from agentloop.web.refusals import Refusal, answer

DATA_FOLDER = ".agentloop-traces"
"""Where traces that other programs send are kept, beside the runs."""

STATIC = Path(str(files("agentloop.viewer"))) / "static"

WEAVE_PREFIX = "/traces"
"""Where weave's client looks for the trace server if only WANDB_BASE_URL is set."""

API_NAMES = ("api", "static", "traces", "v1", "v2")
"""First parts of paths that name no project."""

WEAVE_NAMES = frozenset(path.split("/")[1] for path in weave.HANDLERS) | {"file"}
"""First parts of paths of weave's API. A project may be called so: browsers get its page."""

PAGES = (
    "/", "/{entity}/{project}", "/{entity}/{project}/r/call/{call}", "/{entity}/{project}/weave",
    "/{entity}/{project}/weave/{rest:path}",
)  # fmt: skip
"""Where the page is: its own address, and those that weave's client prints. The page reads them."""


def create_app(runs: Sequence[Path], *, data: Path | None = None, token: str | None = None) -> ASGIApp:
    """Build the whole application.

    Args:
        runs: run directories, and folders of run directories; none of them needs to exist yet.
        data: folder of what other programs send; None: `data_folder(runs)`. It is made when
            something arrives.
        token: opens the server; None: it is open to this machine, and only to it.
    """
    received = Received(data or data_folder(runs))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        received.close()

    app = FastAPI(title="agentloop trace server", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    for kind in (Refusal, AgentloopError):
        app.add_exception_handler(kind, answer)
    app.include_router(build_router(runs, lambda: received.changes))
    for prefix in ("", WEAVE_PREFIX):
        app.include_router(weave.build_router(received), prefix=prefix)
    app.include_router(otlp.build_router(received))
    app.include_router(external.build_router(received))
    app.add_api_route("/health", _health, methods=["GET"])
    if STATIC.is_dir():
        app.mount("/static", StaticFiles(directory=STATIC), name="static")
        for path in PAGES:
            app.add_api_route(path, _page, methods=["GET"])
    return Gate(app, token)


def data_folder(runs: Sequence[Path]) -> Path:
    """Return the default folder of received traces: within the first folder of runs, or beside the
    first run."""
    first = runs[0] if runs else Path("outputs")
    return (first.parent if is_run(first) else first) / DATA_FOLDER


def _health() -> dict[str, bool]:
    return {"ok": True}


def _page(request: Request) -> Response:
    # A program that asks for a path of weave's that is not served must not take the page for it.
    entity, browser = request.path_params.get("entity"), "text/html" in request.headers.get("accept", "")
    if entity in API_NAMES or (entity in WEAVE_NAMES and not browser):
        raise Refusal(404, f"{request.url.path} does not exist")
    return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})
