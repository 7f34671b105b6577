"""Bodies that no client sends: each is refused with a sentence, and nothing of it harms the next."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentloop.viewer import create_app
from agentloop.viewer.weave.routes import HANDLERS

PATHS = (*HANDLERS, "/calls/stream_query", "/v2/lab/x/calls/complete", "/v2/lab/x/call/start", "/v2/lab/x/call/end",
         "/file/content", "/graphql", "/v1/traces")  # fmt: skip

KEYS = (
    "project_id", "id", "batch", "start", "end", "obj", "table", "filter", "query", "sort_by", "limit", "offset",
    "refs",
    "digest", "object_id", "columns", "call_ids", "op_names", "$expr", "$eq", "$getField", "$literal", "updates",
    "rows",
    "val", "payload", "weave_ref", "feedback_type", "started_at", "ended_at", "summary", "inputs", "attributes", "req",
    "resourceSpans", "scopeSpans", "spans", "row_digests", "expand_columns", "$and", "$in", "field", "direction",
)  # fmt: skip

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["lab/x", "2026-01-01T00:00:00Z", "latest", "weave:///lab/x/object/a:latest", "attributes.a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner),
    max_leaves=12,
)  # fmt: skip


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with client(tmp_path) as made:
        yield made


def client(folder: Path) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=create_app([folder]))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), body=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6))
async def test_any_json_is_answered(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    async with client(tmp_path) as http:
        answer = await http.post(path, content=json.dumps(body).encode())
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]


def call(**changes: Any) -> dict[str, Any]:
    return {
        "project_id": "lab/x", "id": "a", "trace_id": "t", "op_name": "think", "started_at": "2026-01-02T03:04:05Z",
        "ended_at": "2026-01-02T03:04:05Z", "attributes": {"step": 1}, "inputs": {}, "output": None, "summary": {},
        **changes,
    }  # fmt: skip


@pytest.mark.parametrize("levels", [250, 300, 900, 1020])
async def test_a_value_that_nests_without_end_spoils_no_query(http: httpx.AsyncClient, levels: int) -> None:
    await http.post("/v2/lab/x/calls/complete", json={"batch": [call(id="first")]})
    body = json.dumps({"batch": [call(id="deep", output="DEEP")]}).replace('"DEEP"', "[" * levels + "]" * levels)
    stored = (await http.post("/v2/lab/x/calls/complete", content=body.encode())).status_code
    assert stored in (200, 400, 422)
    query = {"$expr": {"$not": [{"$eq": [{"$getField": "output.a.b"}, {"$literal": 1}]}]}}
    answer = await http.post("/calls/stream_query", json={"project_id": "lab/x", "query": query})
    assert len(answer.content.splitlines()) == 1 + (stored == 200)
    assert (await http.get("/api/external/calls")).status_code == 200
    assert (await http.get("/api/external/call", params={"id": "deep"})).status_code == (200 if stored == 200 else 404)


async def test_numbers_and_texts_of_any_size_come_back(http: httpx.AsyncClient) -> None:
    inputs = {"n": 2**70, "text": "\x00\u202e\u2028</script>語", "": {"a.b": -0.0}, "float": 1e300}
    answer = await http.post("/v2/lab/x/calls/complete", json={"batch": [call(inputs=inputs)]})
    assert answer.status_code == 200, answer.text
    read = await http.post("/call/read", json={"project_id": "lab/x", "id": "a"})
    assert json.loads(read.content)["call"]["inputs"] == inputs


async def test_a_database_that_is_damaged_is_named(tmp_path: Path) -> None:
    folder = tmp_path / ".agentloop-traces"
    folder.mkdir()
    (folder / "received.sqlite").write_bytes(b"not a database" * 100)
    async with client(tmp_path) as http:
        for answer in (
            await http.post("/calls/query_stats", json={"project_id": "lab/x"}),
            await http.post("/v2/lab/x/calls/complete", json={"batch": [call()]}),
        ):
            assert answer.status_code == 500 and "received.sqlite" in answer.json()["error"]
