"""Bodies that no client sends: each is refused with a sentence, and nothing of it harms the next."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentloop.viewer import create_app
from agentloop.viewer.received import SCHEMA, Received
from agentloop.viewer.weave.routes import HANDLERS
from agentloop.web.refusals import Refusal

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
    return client_of(create_app([folder]))


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    """One for all examples of a test: making it takes many times as long as an answer."""
    return create_app([tmp_path])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), body=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6))
async def test_any_json_is_answered(app: FastAPI, path: str, body: dict[str, Any]) -> None:
    async with client_of(app) as http:
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


async def test_one_value_that_orjson_cannot_write_spoils_no_query(http: httpx.AsyncClient) -> None:
    big = {"n": 2**70}
    await http.post("/v2/lab/x/calls/complete", json={"batch": [call(summary=big, output=big), call(id="b")]})
    ref = "weave:///lab/x/call/a"
    note = {"project_id": "lab/x", "weave_ref": ref, "feedback_type": "note", "payload": big}
    assert (await http.post("/feedback/create", json=note)).status_code == 200
    body = {"project_id": "lab/x", "include_feedback": True, "columns": ["summary", "output.n"]}
    answer = await http.post("/calls/stream_query", json=body)
    first, _ = (json.loads(line) for line in answer.content.splitlines())
    assert first["output"] == big and first["summary"]["n"] == 2**70
    assert first["summary"]["weave"]["feedback"][0]["payload"] == big
    for time in ("0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-10:00"):
        answer = await http.post("/v2/lab/x/calls/complete", json={"batch": [call(id="old", started_at=time)]})
        assert answer.status_code == 422 and "started_at" in answer.json()["error"]


@pytest.mark.parametrize("literal", [True, False])
async def test_thousands_of_operands_are_answered(http: httpx.AsyncClient, literal: bool) -> None:
    await http.post("/v2/lab/x/calls/complete", json={"batch": [call(), call(id="b")]})
    item = {"$getField": "id"}
    if literal:
        expression = {"$in": [item, [{"$literal": f"n{number}"} for number in range(4000)] + [{"$literal": "b"}]]}
    else:
        expression = {"$or": [{"$eq": [item, {"$literal": name}]} for name in [*(f"n{n}" for n in range(2500)), "b"]]}
    body = {"project_id": "lab/x", "query": {"$expr": expression}}
    answer = await http.post("/calls/stream_query", json=body)
    assert [json.loads(line)["id"] for line in answer.content.splitlines()] == ["b"], answer.text[:300]
    names = [f"n{number}" for number in range(3000)] + ["think"]
    body = {"project_id": "lab/x", "filter": {"op_names": names}}
    assert (await http.post("/calls/query_stats", json=body)).json() == {"count": 2}


@pytest.mark.parametrize(
    "expression",
    [
        {"$in": [{"$literal": "x" * 100_000}, [{"$literal": "y"}] * 5000]},
        {"$or": [{"$eq": [{"$literal": "x" * 60_000}, {"$getField": "id"}]}] * 100},
        {"$eq": [{"$getField": "inputs.a\0b"}, {"$literal": 1}]},
        {"$eq": [{"$getField": ["x"]}, {"$literal": 1}]},
        {"$eq": [{"$convert": {"input": {"$literal": 1}, "to": ["x"]}}, {"$literal": 1}]},
    ],
)
async def test_a_hostile_query_is_refused_before_the_answer_begins(http: httpx.AsyncClient, expression: Any) -> None:
    await http.post("/v2/lab/x/calls/complete", json={"batch": [call()]})
    answer = await http.post("/calls/stream_query", json={"project_id": "lab/x", "query": {"$expr": expression}})
    assert answer.status_code == 422 and answer.json()["error"], answer.text[:300]


async def test_what_sqlite_refuses_is_said_before_the_answer_begins(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await http.post("/v2/lab/x/calls/complete", json={"batch": [call()]})
    monkeypatch.setattr("agentloop.viewer.weave.queries.WIDEST", 10_000)
    wide = {"$or": [{"$eq": [{"$getField": "id"}, {"$literal": f"n{number}"}]} for number in range(2000)]}
    for path in ("/calls/stream_query", "/calls/query_stats"):
        answer = await http.post(path, json={"project_id": "lab/x", "query": {"$expr": wide}})
        assert answer.status_code == 422 and "sqlite cannot answer" in answer.json()["error"], path


async def test_refs_that_repeat_are_read_once_and_bounded(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = {"text": "x" * 1000, "list": [1, 2**70]}
    await http.post("/obj/create", json={"obj": {"project_id": "lab/x", "object_id": "o", "val": value}})
    ref = "weave:///lab/x/object/o:latest"
    refs = [ref, f"{ref}/key/list/index/1", ref, f"{ref}/key/list/index/²", "weave:///lab/x/object/o:v²"]
    answer = await http.post("/refs/read_batch", json={"refs": refs})
    assert json.loads(answer.content)["vals"] == [value, 2**70, value, None, None]
    monkeypatch.setattr("agentloop.viewer.weave.refs.MOST_BYTES", 10_000)
    answer = await http.post("/refs/read_batch", json={"refs": [ref] * 20})
    assert answer.status_code == 413 and "fewer refs" in answer.json()["fix"]


async def test_a_data_folder_that_is_deleted_is_made_again(http: httpx.AsyncClient, tmp_path: Path) -> None:
    async def ids() -> list[str]:
        answer = await http.post("/calls/stream_query", json={"project_id": "lab/x"})
        return [json.loads(line)["id"] for line in answer.content.splitlines()]

    await http.post("/v2/lab/x/calls/complete", json={"batch": [call()]})
    assert await ids() == ["a"]
    shutil.rmtree(tmp_path / ".agentloop-traces")
    assert await ids() == []
    assert (await http.post("/v2/lab/x/calls/complete", json={"batch": [call(id="b")]})).status_code == 200
    assert await ids() == ["b"]
    assert (tmp_path / ".agentloop-traces" / "received.sqlite").is_file()


def test_a_call_without_its_end_is_stored_also_in_an_older_database(tmp_path: Path) -> None:
    old = SCHEMA
    for name in ("attributes", "inputs", "output", "summary"):
        old = old.replace(f"{name} IS NULL OR json_valid({name})", f"{name} IS NOT NULL AND json_valid({name})")
    with sqlite3.connect(tmp_path / "received.sqlite") as made:
        made.executescript(old + "PRAGMA user_version = 1;")
        insert = "INSERT INTO calls (project, id, attributes, inputs, output, summary) VALUES "
        made.execute(insert + "('p', 'whole', '1', '2', '3', '4')")
    made.close()
    received = Received(tmp_path)
    with received.writing() as connection:
        connection.execute("INSERT INTO calls (project, id, inputs) VALUES ('p', 'open', '{}')")
    with received.reading() as connection:
        rows = connection.execute("SELECT id, output FROM calls ORDER BY id").fetchall()
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
    assert [tuple(row) for row in rows] == [("open", None), ("whole", "3")] and "calls_by_parent" in names
    with pytest.raises(Refusal, match=r"output cannot be stored.*JSON"), received.writing() as connection:
        connection.execute("INSERT INTO calls (project, id, output) VALUES ('p', 'x', '{')")
    with pytest.raises(Refusal, match=r"NOT NULL constraint failed: calls\.id"), received.writing() as connection:
        connection.execute("INSERT INTO calls (project) VALUES ('p')")
    received.close()
