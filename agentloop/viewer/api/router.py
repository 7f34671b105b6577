"""The routes below `/api`, and the parameters of each."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from agentloop.errors import TraceError, UserError
from agentloop.files import json_line
from agentloop.text import hide_secrets
from agentloop.trace.index import CHOICES, RANGES, SORTS, EpisodeFilter, Sort, TraceIndex
from agentloop.trace.record import SPLITS, RecordKey
from agentloop.types import EpisodeStatus
from agentloop.viewer.api.conversation import episode_json
from agentloop.viewer.api.events import Events
from agentloop.viewer.api.groups import group_json, task_json
from agentloop.viewer.api.images import image_response
from agentloop.viewer.api.metrics import MOST_POINTS, metrics_json
from agentloop.viewer.api.parameters import Parameters
from agentloop.viewer.api.run import Run, warm_up
from agentloop.viewer.api.runs import Runs
from agentloop.viewer.api.tokens import MOST_TOKENS, tokens_json
from agentloop.viewer.api.traces import trace_json
from agentloop.web.refusals import Refusal

MOST_ROWS = 500
MOST_STEPS = 2**31 - 1
DEFAULT_TOKENS = 4_096

Read = Callable[[Run, Parameters], Any]


def build_router(runs: Sequence[Path], arrivals: Callable[[], int] = lambda: 0) -> APIRouter:
    """Return the routes below `/api`.

    Args:
        runs: run directories, and folders of run directories; one that does not exist yet has none.
        arrivals: counts what other programs sent, for the events.
    """
    warm_up()
    found = Runs(runs)
    events = Events(found, arrivals)

    @contextlib.asynccontextmanager
    async def closing(_: object) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(found.close)

    router = APIRouter(prefix="/api", lifespan=closing)

    # Functions without `async` run in threads: they read files.
    def list_runs(request: Request) -> Response:
        _parameters(request).finish()
        return _json({"runs": [run.summary() for run in found.all()]})

    def trace(request: Request, trace_id: str) -> Response:
        _parameters(request).finish()
        return _json(trace_json(found.all(), trace_id))

    def image(request: Request, run: str, digest: str) -> Response:
        _parameters(request).finish()
        images = _run(found, run).images
        return image_response(images.find(digest), images.folder, digest)

    async def stream(request: Request) -> Response:
        _parameters(request).finish()
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events.subscribe(), media_type="text/event-stream", headers=headers)

    router.add_api_route("/runs", list_runs, methods=["GET"])
    router.add_api_route("/traces/{trace_id}", trace, methods=["GET"])
    router.add_api_route("/events", stream, methods=["GET"])
    router.add_api_route("/runs/{run}/image/{digest}", image, methods=["GET"])
    for path, read in _ROUTES.items():
        router.add_api_route(f"/runs/{{run}}{path}", _endpoint(found, read), methods=["GET"])
    return router


def _endpoint(runs: Runs, read: Read) -> Callable[..., Response]:
    def endpoint(request: Request, run: str) -> Response:
        try:
            return _json(read(_run(runs, run), _parameters(request)))
        except TraceError as exc:
            raise Refusal(404, exc.message, exc.hint) from exc
        except UserError as exc:
            raise Refusal(400, exc.message, exc.hint) from exc

    return endpoint


def _describe(run: Run, parameters: Parameters) -> Any:
    parameters.finish()
    index = run.index()
    return {
        **run.summary(),
        "config": hide_secrets(run.record.config) or None,
        "env": hide_secrets(run.record.env) or None,
        "traces": index.bounds(),
        "indexing": run.indexing,
        "has_text": run.decoder() is not None,
        "problems": run.problems(),
    }


def _metrics(run: Run, parameters: Parameters) -> Any:
    keys = [key for text in parameters.texts("keys") for key in text.split(",") if key]
    points = parameters.integer("points", 600, 1, MOST_POINTS)
    parameters.finish()
    return metrics_json(run.record, keys, points)


def _episodes(run: Run, parameters: Parameters) -> Any:
    wanted, sort = _filter(parameters), _sort(parameters)
    offset = parameters.integer("offset", 0, 0, 2**40)
    limit = parameters.integer("limit", 50, 0, MOST_ROWS)
    counted = parameters.text("facets", "1", ("0", "1")) == "1"
    parameters.finish()
    index = run.index()
    page = index.query(wanted, sort, offset=offset, limit=limit)
    return {
        "total": page.total,
        "offset": offset,
        "rows": page.rows,
        "facets": _facets(index, wanted) if counted else None,
        "indexing": run.indexing,
        "problems": run.problems(),
    }


def _facets(index: TraceIndex, wanted: EpisodeFilter) -> dict[str, Any]:
    """Return the counts of each facet, and the range of steps of the whole run."""
    splits = index.bounds()["splits"].values()
    first = min((split["first_step"] for split in splits), default=None)
    last = max((split["last_step"] for split in splits), default=None)
    return {**index.facets(wanted), "step": [first, last]}


def _around(run: Run, parameters: Parameters) -> Any:
    key, wanted, sort = _key(parameters), _filter(parameters), _sort(parameters)
    parameters.finish()
    return run.index().around(key, wanted, sort)


def _episode(run: Run, parameters: Parameters) -> Any:
    key = _key(parameters)
    parameters.finish()
    return episode_json(run.trajectory(key), run.decoder())


def _tokens(run: Run, parameters: Parameters) -> Any:
    key = _key(parameters)
    start = parameters.integer("start", 0, 0, MOST_STEPS)
    end = parameters.integer("end", start + DEFAULT_TOKENS, 0, MOST_STEPS)
    parameters.finish()
    if not start <= end <= start + MOST_TOKENS:
        raise Refusal(400, f"start={start} and end={end} are out of bounds", f"ask for at most {MOST_TOKENS} tokens")
    return tokens_json(run.trajectory(key), start, end, run.decoder())


def _group(run: Run, parameters: Parameters) -> Any:
    step = parameters.integer("step", -1, 0, MOST_STEPS)
    split = parameters.text("split", "train", SPLITS)
    group_id = parameters.required("group_id")
    parameters.finish()
    if step < 0:
        raise Refusal(400, "the parameter step is missing", "add ?step=")
    return group_json(run, step, split, group_id)


def _task(run: Run, parameters: Parameters) -> Any:
    task_id = parameters.required("task_id")
    parameters.finish()
    return task_json(run, task_id)


def _failures(run: Run, parameters: Parameters) -> Any:
    parameters.finish()
    index = run.index()
    return {"causes": index.failures(), "indexing": run.indexing, "problems": run.problems()}


def _signals(run: Run, parameters: Parameters) -> Any:
    parameters.finish()
    return run.signals()


_ROUTES: dict[str, Read] = {
    "": _describe,
    "/metrics": _metrics,
    "/episodes": _episodes,
    "/around": _around,
    "/episode": _episode,
    "/tokens": _tokens,
    "/group": _group,
    "/task": _task,
    "/failures": _failures,
    "/signals": _signals,
}


def _filter(parameters: Parameters) -> EpisodeFilter:
    """Read which episodes are wanted: `status=failed`, `step=3-9`, `min_reward=0.5`, `q=word`."""
    choices = []
    for column in CHOICES:
        options = {"split": SPLITS, "status": tuple(EpisodeStatus)}.get(column)
        if texts := parameters.texts(column, options):
            choices.append((column, texts))
    ranges = []
    for column in RANGES:
        least, most = parameters.number(f"min_{column}"), parameters.number(f"max_{column}")
        if column == "step" and (text := parameters.text("step")):
            least, most = _step_range(text)
        if least is not None or most is not None:
            ranges.append((column, least, most))
    tools = "".join(f' tool:"{name.replace(chr(34), " ")}"' for name in parameters.texts("tool"))
    return EpisodeFilter(tuple(choices), tuple(ranges), parameters.text("q") + tools)


_STEPS = re.compile(r"([0-9]{0,9})(-?)([0-9]{0,9})")


def _step_range(text: str) -> tuple[float | None, float | None]:
    match = _STEPS.fullmatch(text)
    if match is None or not (match[1] or match[3]):
        raise Refusal(400, f"step={text[:40]!r} is neither a step nor a range of steps", "give step=3 or step=3-9")
    first, last = (float(step) if step else None for step in (match[1], match[3]))
    return first, last if match[2] else first


def _sort(parameters: Parameters) -> Sort:
    text = parameters.text("sort", "-step")
    try:
        return Sort.parse(text)
    except ValueError as exc:
        raise Refusal(400, str(exc), f"sort by one of {', '.join(SORTS)}; -reward: the highest first") from exc


def _key(parameters: Parameters) -> str:
    text = parameters.required("key")
    try:
        key = RecordKey.parse(text)
    except ValueError as exc:
        raise Refusal(400, f"key={text[:200]!r} is not the key of a trajectory", "take it from /episodes") from exc
    if not 0 <= key.step <= MOST_STEPS or str(key) != text:
        raise Refusal(400, f"key={text[:200]!r} is not the key of a trajectory", "take it from /episodes")
    return text


def _run(runs: Runs, run_id: str) -> Run:
    found = runs.get(run_id)
    if found is None:
        raise Refusal(404, f"there is no run {run_id[:200]!r}", "see /api/runs for those that there are")
    return found


def _parameters(request: Request) -> Parameters:
    return Parameters(request.query_params.multi_items())


def _json(value: Any) -> Response:
    return Response(json_line(value), media_type="application/json", headers={"Cache-Control": "no-store"})
