"""The list of received calls: a search looks below the roots, and a root shows what failed below it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentloop.viewer import create_app
from tests.agentloop.viewer.test_otlp import request, span

OUTPUT = {"expression": "minus"}


def call(name: str, trace: str, parent: str | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "project_id": "lab/x", "id": name, "trace_id": trace, "parent_id": parent, "op_name": f"weave:///lab/x/op/{name}:1",
        "started_at": "2026-01-02T03:04:05Z", "ended_at": "2026-01-02T03:04:06Z", "attributes": {}, "inputs": {},
        "output": None, "summary": {}, **changes,
    }  # fmt: skip


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app([tmp_path])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        calls = [
            call("agent", "t1"), call("turn", "t1", "agent"), call("tool", "t1", "turn", exception="minus is broken"),
            call("fine", "t2", inputs={"text": "no MINUS here"}), call("below", "t2", "fine", output=OUTPUT),
            call("other", "t3"),
        ]  # fmt: skip
        (await client.post("/v2/lab/x/calls/complete", json={"batch": calls})).raise_for_status()
        failed = {"status": {"code": "STATUS_CODE_ERROR", "message": "minus is away"}}
        body = request(span("invoke", 1), span("turn", 2, 1), span("execute", 3, 2, **failed))
        (await client.post("/v1/traces", json=body)).raise_for_status()
        yield client


async def rows(http: httpx.AsyncClient, **query: Any) -> dict[str, dict[str, Any]]:
    answer = await http.get("/api/external/calls", params=query)
    assert answer.status_code == 200, answer.text
    assert answer.json()["total"] == len(answer.json()["rows"])
    return {row["op_name"]: row for row in answer.json()["rows"]}


async def test_a_search_finds_roots_by_the_calls_below_them_and_names_the_hit(http: httpx.AsyncClient) -> None:
    found = await rows(http, q="Minus is")
    assert found.keys() == {"agent", "invoke"}
    assert found["agent"]["hit"] == {"id": "tool", "name": "tool", "text": "minus is broken"}
    assert (found["invoke"]["hit"]["name"], found["invoke"]["hit"]["text"]) == ("execute", "minus is away")
    found = await rows(http, q="minus")
    assert found.keys() == {"agent", "invoke", "fine"}
    assert "hit" not in found["fine"], "the root holds the words itself"
    assert (await rows(http, q="minus", all=True)).keys() == {"tool", "execute", "fine", "below"}
    assert (await rows(http, q="minus", place="lab/x", status="error inside")).keys() == {"agent"}
    assert (await rows(http, q="nowhere")).keys() == set()


async def test_a_long_text_is_shown_around_the_words(http: httpx.AsyncClient) -> None:
    long = [call("far", "t4"), call("deep", "t4", "far", output="x" * 500 + "needle" + "y" * 500)]
    await http.post("/v2/lab/x/calls/complete", json={"batch": long})
    (row,) = (await rows(http, q="needle")).values()
    raised = call("raised", "t4", "far", exception='{"type": "ValueError", "message": "no thread"}')
    await http.post("/v2/lab/x/calls/complete", json={"batch": [raised]})
    (other,) = (await rows(http, q="thread")).values()
    assert other["hit"]["text"] == "ValueError: no thread"
    assert row["hit"]["text"] == "…" + "x" * 24 + "needle" + "y" * 120 + "…"


async def test_a_root_says_that_a_call_below_it_failed(http: httpx.AsyncClient) -> None:
    found = await rows(http)
    assert {name: row["status"] for name, row in found.items()} == {
        "agent": "error inside", "invoke": "error inside", "fine": "ok", "other": "ok",
    }  # fmt: skip
    facets = (await http.get("/api/external/calls")).json()["facets"]["status"]
    assert facets == {"error inside": 2, "ok": 2}


async def test_filters_that_there_are_not_are_refused(http: httpx.AsyncClient) -> None:
    refused = await http.get("/api/external/calls", params={"projekt": "lab/x"})
    assert (refused.status_code, refused.json()["error"]) == (400, "'projekt' is not a filter of calls")
    assert (await rows(http, place="x")).keys() == set()
    assert (await rows(http, place="lab/x")).keys() == {"agent", "fine", "other"}


async def test_a_published_object_can_be_read(http: httpx.AsyncClient) -> None:
    body = {"obj": {"project_id": "lab/x", "object_id": "settings", "val": {"turns": 4}}}
    digest = (await http.post("/obj/create", json=body)).json()["digest"]
    place = {"entity": "lab", "project": "x", "name": "settings"}
    found = await http.get("/api/external/object", params={**place, "digest": digest})
    assert found.json()["obj"]["val"] == {"turns": 4}
    assert (await http.get("/api/external/object", params={**place, "digest": "no"})).status_code == 404
