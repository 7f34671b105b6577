"""The routes of weave's trace server over HTTP, without weave's client: what it never sends too."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from agentloop.viewer import create_app
from agentloop.viewer.weave.queries import condition
from agentloop.viewer.weave.reading import COLUMNS
from agentloop.viewer.weave.values import digest_of, digest_of_table, digest_of_value

START = "2026-01-02T03:04:05.000006Z"
END = "2026-01-02T03:04:06Z"


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app([tmp_path])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        yield client


def call(name: str = "a", **changes: Any) -> dict[str, Any]:
    return {
        "project_id": "lab/x", "id": name, "trace_id": "t", "op_name": "think", "started_at": START, "ended_at": END,
        "attributes": {"step": 1}, "inputs": {"n": 2}, "output": {"list": [1, {"deep": "er"}]}, "summary": {},
        **changes,
    }  # fmt: skip


async def write(http: httpx.AsyncClient, *calls: dict[str, Any]) -> httpx.Response:
    return await http.post("/v2/lab/x/calls/complete", json={"batch": list(calls)})


async def ids(http: httpx.AsyncClient, expression: Any = None, **body: Any) -> list[str]:
    query = None if expression is None else {"$expr": expression}
    answer = await http.post("/calls/stream_query", json={"project_id": "lab/x", "query": query, **body})
    assert answer.status_code == 200, answer.text
    count = await http.post("/calls/query_stats", json={"project_id": "lab/x", "query": query, **body})
    found = [orjson.loads(line)["id"] for line in answer.content.splitlines()]
    assert count.json()["count"] == len(found)
    return found


def field(name: str) -> dict[str, Any]:
    return {"$getField": name}


def literal(value: Any) -> dict[str, Any]:
    return {"$literal": value}


async def test_nothing_is_written_before_something_arrives(http: httpx.AsyncClient, tmp_path: Path) -> None:
    assert await ids(http) == []
    assert not list(tmp_path.iterdir())


async def test_a_call_sent_twice_is_stored_once(http: httpx.AsyncClient) -> None:
    for output in (1, 2):
        assert (await write(http, call(output=output))).status_code == 200
    assert await ids(http) == ["a"]
    read = await http.post("/call/read", json={"project_id": "lab/x", "id": "a"})
    assert read.json()["call"]["output"] == 2
    assert read.json()["call"]["started_at"] == START
    assert read.json()["call"]["summary"]["weave"] == {"status": "success", "trace_name": "think", "latency_ms": 999}


async def test_an_end_may_come_before_its_start(http: httpx.AsyncClient) -> None:
    end = {"project_id": "lab/x", "id": "a", "ended_at": END, "summary": {}, "output": 5}
    start = {key: value for key, value in call().items() if key not in ("ended_at", "output", "summary")}
    assert (await http.post("/call/upsert_batch", json={"batch": [{"req": {"end": end}}]})).json() == {"res": [{}]}
    assert await ids(http) == []
    answer = await http.post("/v2/lab/x/call/start", json={"start": start})
    assert answer.json() == {"id": "a", "trace_id": "t"}
    read = (await http.post("/call/read", json={"project_id": "lab/x", "id": "a"})).json()["call"]
    assert (read["output"], read["ended_at"], read["inputs"]) == (5, END, {"n": 2})


async def test_a_call_without_an_end_is_running(http: httpx.AsyncClient) -> None:
    start = {key: value for key, value in call().items() if key not in ("ended_at", "output", "summary", "id")}
    given = (await http.post("/call/start", json={"start": start})).json()["id"]
    assert await ids(http, {"$eq": [field("summary.weave.status"), literal("running")]}) == [given]


STEPS = [3, 3.0, "3", "3.0", " 3", "three", True, None, [3], {"a": 3}, 30, "", 2**70]


@pytest.mark.parametrize("number", [3, 3.0, 1, 30, 2**70, -1])
async def test_the_indexed_attribute_is_compared_as_any_other(http: httpx.AsyncClient, number: float) -> None:
    calls = [call(str(n), attributes={"step": step, "other": step}) for n, step in enumerate(STEPS)]
    await write(http, *calls, call("elsewhere", attributes={"other": 3}))
    await http.post("/v2/lab/y/calls/complete", json={"batch": [{**calls[0], "project_id": "lab/y", "id": "y"}]})
    for form in (
        lambda name: {"$eq": [field(name), literal(number)]},
        lambda name: {"$eq": [literal(number), field(name)]},
        lambda name: {"$not": [{"$eq": [field(name), literal(number)]}]},
        lambda name: {"$or": [{"$eq": [field(name), literal(number)]}, {"$eq": [field("id"), literal("5")]}]},
    ):
        found = set(await ids(http, form("attributes.step"))) - {"elsewhere"}
        assert found == set(await ids(http, form("attributes.other"))) - {"elsewhere"}
    assert bool(await ids(http, {"$eq": [field("attributes.step"), literal(number)]})) == (number != -1)


async def test_calls_of_a_step_are_found_through_its_index(http: httpx.AsyncClient, tmp_path: Path) -> None:
    await write(http, call("a"))
    where = condition({"$expr": {"$eq": [field("attributes.step"), literal(1)]}}, COLUMNS)
    with closing(sqlite3.connect(next(tmp_path.rglob("received.sqlite")))) as connection:
        connection.create_function("as_number", 1, lambda value: value)
        query = f"EXPLAIN QUERY PLAN SELECT id FROM calls WHERE {where.text}"  # noqa: S608  # our own
        plan = connection.execute(query, where.values).fetchall()
    assert any("calls_by_step" in row[-1] for row in plan), plan


QUERIES: list[tuple[Any, list[str]]] = [
    ({"$eq": [field("attributes.step"), literal(1)]}, ["a"]),
    ({"$eq": [field("attributes.step"), literal("1")]}, ["a"]),
    ({"$eq": [literal(2), field("attributes.step")]}, ["b"]),
    ({"$not": [{"$eq": [field("attributes.step"), literal(1)]}]}, ["b", "c"]),
    ({"$eq": [field("attributes.missing"), literal(None)]}, ["a", "b", "c"]),
    ({"$gt": [field("attributes.step"), literal(0.5)]}, ["a", "b"]),
    ({"$gte": [field("inputs.text"), literal("b")]}, ["b"]),
    ({"$lt": [field("inputs.text"), literal(3)]}, []),
    ({"$eq": [field("output.list.0"), literal(1)]}, ["a", "b", "c"]),
    ({"$eq": [field("output.list.1.deep"), literal("er")]}, ["a", "b", "c"]),
    ({"$in": [field("id"), [literal("c"), literal("b")]]}, ["b", "c"]),
    ({"$in": [field("id"), []]}, []),
    ({"$or": [{"$eq": [field("id"), literal("a")]}, {"$eq": [field("id"), literal("c")]}]}, ["a", "c"]),
    ({"$and": []}, ["a", "b", "c"]),
    ({"$contains": {"input": field("inputs.text"), "substr": literal("BAN"), "case_insensitive": True}}, ["b"]),
    ({"$contains": {"input": field("inputs.text"), "substr": literal("BAN")}}, []),
    ({"$gt": [{"$convert": {"input": field("inputs.n"), "to": "double"}}, literal(2)]}, ["c"]),
    ({"$eq": [{"$convert": {"input": field("inputs.text"), "to": "exists"}}, literal(True)]}, ["a", "b"]),
    ({"$eq": [field("attributes.flag"), literal(True)]}, ["b"]),
    ({"$eq": [field("attributes.a\\.b"), literal(7)]}, ["b"]),
    ({"$eq": [field("exception"), literal(None)]}, ["a", "b"]),
    ({"$eq": [field("summary.weave.status"), literal("error")]}, ["c"]),
    ({"$gte": [field("started_at"), literal("2026-01-02T03:04:07Z")]}, ["c"]),
    ({"$gt": [field("started_at"), literal(1767323046)]}, ["c"]),
    ({"$lte": [field("summary.weave.latency_ms"), literal(999)]}, ["a", "b", "c"]),
]


@pytest.mark.parametrize(("expression", "expected"), QUERIES)
async def test_queries(http: httpx.AsyncClient, expression: Any, expected: list[str]) -> None:
    later = {"started_at": "2026-01-02T03:04:07Z", "ended_at": "2026-01-02T03:04:07.5+00:00"}
    await write(
        http,
        call("a", inputs={"text": "apple", "n": "2"}),
        call("b", attributes={"step": 2, "flag": True, "a.b": 7}, inputs={"text": "banana", "n": 1}),
        call("c", attributes={}, inputs={"n": "12.5"}, exception="boom", **later),
    )
    assert await ids(http, expression) == expected


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"call_ids": ["b", "zz"]}, ["b"]),
        ({"trace_ids": ["t"]}, ["a", "b"]),
        ({"parent_ids": ["a"]}, ["b"]),
        ({"trace_roots_only": True}, ["a", "c"]),
        ({"op_names": ["weave:///lab/x/op/act:*"]}, ["b", "c"]),
        ({"op_names": ["weave:///lab/x/op/act:1"]}, ["b"]),
        ({"op_names": ["act", "think"]}, ["a", "b", "c"]),
        ({"op_names": []}, []),
        ({"input_refs": ["weave:///lab/x/object/o:1"]}, ["c"]),
    ],
)
async def test_filters(http: httpx.AsyncClient, chosen: Any, expected: list[str]) -> None:
    await write(
        http,
        call("a"),
        call("b", parent_id="a", op_name="weave:///lab/x/op/act:1"),
        call("c", trace_id="u", op_name="weave:///lab/x/op/act:2", inputs={"o": "weave:///lab/x/object/o:1"}),
    )
    assert await ids(http, filter=chosen) == expected
    assert await ids(http, filter=chosen, project_id="lab/other") == []


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"project_id": "lab/x", "query": {"$expr": {"$eq": [field("attributes.step")]}}},
        {"project_id": "lab/x", "query": {"$expr": {"$where": "1"}}},
        {"project_id": "lab/x", "query": {"$expr": {"$eq": [field("nothing"), literal(1)]}}},
        {"project_id": "lab/x", "query": {"$expr": {"$eq": [field('attributes.x"y'), literal(1)]}}},
        {"project_id": "lab/x", "sort_by": [{"field": "id; DROP TABLE calls", "direction": "asc"}]},
        {"project_id": "lab/x", "sort_by": [{"field": "id", "direction": "down"}]},
        {"project_id": "lab/x", "filter": {"secret": 1}},
        {"project_id": "lab/x", "limit": -1},
    ],
)
async def test_a_wrong_query_is_named(http: httpx.AsyncClient, body: Any) -> None:
    answer = await http.post("/calls/stream_query", json=body)
    assert answer.status_code == 422 and answer.json()["error"]


async def test_a_query_that_nests_without_end_is_refused(http: httpx.AsyncClient) -> None:
    expression: Any = {"$eq": [literal(1), literal(1)]}
    for _ in range(60):
        expression = {"$not": [expression]}
    body = {"project_id": "lab/x", "query": {"$expr": expression}}
    assert "nested deeper" in (await http.post("/calls/stream_query", json=body)).json()["error"]


@pytest.mark.parametrize(
    "wrong", [{"started_at": "soon"}, {"inputs": [1]}, {"id": ""}, {"op_name": None}, {"summary": None}]
)
async def test_a_wrong_call_is_named_and_nothing_of_its_batch_is_stored(http: httpx.AsyncClient, wrong: Any) -> None:
    answer = await write(http, call("good"), call("bad", **wrong))
    assert answer.status_code == 422
    assert next(iter(wrong)) in answer.json()["error"]
    assert await ids(http) == []


async def test_deleting_a_call_deletes_those_below_it(http: httpx.AsyncClient) -> None:
    await write(http, call("a"), call("b", parent_id="a"), call("c", parent_id="b"), call("d"))
    answer = await http.post("/calls/delete", json={"project_id": "lab/x", "call_ids": ["a"]})
    assert answer.json() == {"num_deleted": 3}
    assert await ids(http) == ["d"]


async def test_columns_and_sizes(http: httpx.AsyncClient) -> None:
    await write(http, call("a", inputs={"n": {"deep": 1, "other": 2}}), call("b"))
    body = {"project_id": "lab/x", "columns": ["inputs.n.deep", "summary.weave.status"], "limit": 1}
    line = orjson.loads((await http.post("/calls/stream_query", json=body)).content)
    assert (line["inputs"], line["attributes"], line["summary"]) == (
        {"n": {"deep": 1}}, {}, {"weave": {"status": "success"}}
    )  # fmt: skip
    assert "output" not in line
    body = {"project_id": "lab/x", "include_storage_size": True, "include_total_storage_size": True}
    rows = [orjson.loads(row) for row in (await http.post("/calls/stream_query", json=body)).content.splitlines()]
    assert rows[0]["total_storage_size_bytes"] == sum(row["storage_size_bytes"] for row in rows) > 0


async def test_files_are_named_by_their_digest(http: httpx.AsyncClient) -> None:
    content = bytes(range(256)) + b"\r\n--x\r\n"
    answer = await http.post("/file/create", data={"project_id": "lab/x"}, files={"file": ("a.bin", content)})
    assert answer.json() == {"digest": digest_of(content)}
    read = await http.post("/file/content", json={"project_id": "lab/x", "digest": digest_of(content)})
    assert read.content == content
    assert read.headers["content-disposition"] == "attachment"
    for digest in ("../../etc/passwd", "a" * 43):
        missing = await http.post("/file/content", json={"project_id": "lab/x", "digest": digest})
        assert missing.status_code == 404
    other = {"project_id": "lab/x", "expected_digest": "b" * 43}
    assert (await http.post("/file/create", data=other, files={"file": ("a", b"x")})).status_code == 409
    assert (await http.post("/file/create", data={"project_id": "lab/x"})).status_code in (415, 422)


async def test_tables_change_by_rows(http: httpx.AsyncClient) -> None:
    rows = [{"n": 3}, {"n": 1}]
    made = await http.post("/table/create", json={"table": {"project_id": "lab/x", "rows": rows}})
    assert made.json()["digest"] == digest_of_table(digest_of_value(row) for row in rows)
    changes = [{"append": {"row": {"n": 2}}}, {"pop": {"index": 1}}, {"insert": {"index": 0, "row": {"n": 0}}}]
    body = {"project_id": "lab/x", "base_digest": made.json()["digest"], "updates": changes}
    changed = (await http.post("/table/update", json=body)).json()["digest"]
    ask = {"project_id": "lab/x", "digest": changed, "sort_by": [{"field": "n", "direction": "desc"}]}
    found = (await http.post("/table/query", json=ask)).json()["rows"]
    assert [(row["val"]["n"], row["original_index"]) for row in found] == [(3, 1), (2, 2), (0, 0)]
    page = (await http.post("/table/query", json={**ask, "sort_by": None, "offset": 1, "limit": 1})).json()["rows"]
    assert [row["val"]["n"] for row in page] == [3]
    assert (await http.post("/table/query_stats", json=ask)).json() == {"count": 3}
    body["updates"] = [{"pop": {"index": 9}}]
    assert (await http.post("/table/update", json=body)).status_code == 422


async def test_only_the_queries_of_weave_are_answered_as_graphql(http: httpx.AsyncClient) -> None:
    answer = await http.post("/graphql", json={"query": "query { viewer { username } }"})
    assert answer.json()["data"]["viewer"]["username"] == "local"
    assert (await http.post("/graphql", json={"query": "query { secrets { all } }"})).status_code == 400
