"""Spans of OpenTelemetry: in protobuf and JSON, packed or not, and what the page gets of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.protobuf.json_format import ParseDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from agentloop.viewer import create_app

TRACE = "0af7651916cd43dd8448eb211c80319c"
PROTOBUF = {"Content-Type": "application/x-protobuf"}


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app([tmp_path])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        yield client


def attribute(key: str, value: Any) -> dict[str, Any]:
    return {"key": key, "value": value}


def span(name: str, number: int, parent: int | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "traceId": TRACE, "spanId": f"{number:016x}", **({} if parent is None else {"parentSpanId": f"{parent:016x}"}),
        "name": name, "kind": "SPAN_KIND_CLIENT", "startTimeUnixNano": str(1_700_000_000_000_000_000 + number * 1000),
        "endTimeUnixNano": str(1_700_000_001_500_000_000), **changes,
    }  # fmt: skip


def request(*spans: dict[str, Any], service: str = "agent") -> dict[str, Any]:
    resource = {"attributes": [attribute("service.name", {"stringValue": service})]}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": list(spans)}]}]}


TREE = (
    span(
        "tool", 2, 1,
        attributes=[
            attribute("gen_ai.tool.call.arguments", {"stringValue": '{"a": 1}'}),
            attribute("gen_ai.tool.call.result", {"stringValue": "two"}),
            attribute("count", {"intValue": "3"}),
            attribute("list", {"arrayValue": {"values": [{"boolValue": True}, {"doubleValue": 0.5}]}}),
        ],
        status={"code": "STATUS_CODE_ERROR", "message": "it broke"},
        events=[{"name": "retry", "timeUnixNano": "1700000000000000000", "attributes": []}],
    ),
    span("agent", 1),
)  # fmt: skip


async def calls(http: httpx.AsyncClient, **query: Any) -> list[str]:
    answer = await http.get("/api/external/calls", params=query)
    assert answer.status_code == 200, answer.text
    assert answer.json()["total"] == len(answer.json()["rows"])
    return [row["op_name"] for row in answer.json()["rows"]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("protobuf", [False, True])
async def test_both_forms_are_stored_once(http: httpx.AsyncClient, protobuf: bool, packed: bool) -> None:
    body = ParseDict(request(), ExportTraceServiceRequest())
    text = json.dumps(request(*TREE)).encode()
    headers = {"Content-Type": "application/json"}
    if protobuf:
        # Ids are bytes in protobuf and base64 in its general JSON form, but hexadecimal in OTLP's.
        for group in body.resource_spans:
            for one in TREE:
                bare = {key: value for key, value in one.items() if not key.endswith("Id")}
                made = ParseDict(bare, group.scope_spans[0].spans.add())
                made.trace_id, made.span_id = bytes.fromhex(TRACE), bytes.fromhex(one["spanId"])
                made.parent_span_id = bytes.fromhex(one.get("parentSpanId", ""))
        text, headers = body.SerializeToString(), PROTOBUF
    if packed:
        text, headers = gzip.compress(text), {**headers, "Content-Encoding": "gzip"}
    for _ in range(2):
        answer = await http.post("/v1/traces", content=text, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.content == (b"" if protobuf else b"{}\n")
    assert await calls(http) == ["agent"]
    assert await calls(http, all=True, sort="started_at") == ["agent", "tool"]

    root = (await http.get("/api/external/calls")).json()["rows"][0]
    assert (root["source"], root["entity"], root["project"], root["children"]) == ("otlp", "otlp", "agent", 1)
    found = (await http.get("/api/external/call", params={"id": f"{TRACE}-{2:016x}"})).json()
    assert [row["op_name"] for row in found["tree"]] == ["agent", "tool"], "parents first"
    call = found["call"]
    assert (call["status"], call["exception"], call["parent_id"]) == ("error", "it broke", root["id"])
    assert call["inputs"] == {"gen_ai.tool.call.arguments": {"a": 1}}
    assert call["output"] == {"gen_ai.tool.call.result": "two"}
    assert call["attributes"] == {"count": 3, "list": [True, 0.5], "span.kind": "client"}
    assert call["summary"]["events"][0]["name"] == "retry"
    assert call["duration_s"] == pytest.approx(1.499998)


async def test_spans_with_wrong_ids_are_counted_and_the_others_stored(http: httpx.AsyncClient) -> None:
    wrong = [span("a", 3, traceId="00" * 16), span("b", 4, spanId="xyz"), span("c", 5, startTimeUnixNano="soon")]
    answer = await http.post("/v1/traces", json=request(span("good", 1), *wrong))
    assert answer.json()["partialSuccess"]["rejectedSpans"] == "3"
    assert await calls(http) == ["good"]
    body = ParseDict(request(), ExportTraceServiceRequest())
    body.resource_spans[0].scope_spans[0].spans.add().name = "no ids"
    answer = await http.post("/v1/traces", content=body.SerializeToString(), headers=PROTOBUF)
    assert ExportTraceServiceResponse.FromString(answer.content).partial_success.rejected_spans == 1


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"\x00garbage", PROTOBUF, 400),
        (b"{", {"Content-Type": "application/json"}, 400),
        (b"[]", {"Content-Type": "application/json"}, 400),
        (b'{"resourceSpans": 5}', {"Content-Type": "application/json"}, 200),
        (b"x", {"Content-Type": "text/plain"}, 415),
        (b"x", {**PROTOBUF, "Content-Encoding": "gzip"}, 400),
    ],
)
async def test_wrong_bodies(http: httpx.AsyncClient, body: bytes, headers: dict[str, str], status: int) -> None:
    assert (await http.post("/v1/traces", content=body, headers=headers)).status_code == status
    assert await calls(http) == []


async def test_a_span_whose_parent_was_not_sent_is_a_root(http: httpx.AsyncClient) -> None:
    await http.post("/v1/traces", json=request(span("inner", 2, 1)))
    assert await calls(http) == ["inner"]
    await http.post("/v1/traces", json=request(span("outer", 1)))
    assert await calls(http) == ["outer"]


async def test_runs_and_episodes_are_told_apart(http: httpx.AsyncClient) -> None:
    for number, run in ((1, "first"), (2, "second")):
        key = attribute("gen_ai.conversation.id", {"stringValue": f"train/1/{number}"})
        sent = request(span("episode", number, attributes=[key]), service="agentloop")
        sent["resourceSpans"][0]["resource"]["attributes"] += [
            attribute("openinference.project.name", {"stringValue": run})
        ]
        await http.post("/v1/traces", json=sent)
    rows = (await http.get("/api/external/calls", params={"sort": "started_at"})).json()["rows"]
    shown = [(row["project"], row["display_name"]) for row in rows]
    assert shown == [("first", "episode train/1/1"), ("second", "episode train/1/2")]
    found = (await http.get("/api/external/calls", params={"project": "second"})).json()["rows"]
    assert [row["display_name"] for row in found] == ["episode train/1/2"]


async def test_a_preview_keeps_the_word_null(http: httpx.AsyncClient) -> None:
    call = {
        "project_id": "lab/x", "trace_id": "a", "op_name": "think", "attributes": {}, "inputs": {}, "summary": {},
        "started_at": "2026-01-02T00:00:00Z", "ended_at": "2026-01-02T00:00:01Z",
    }  # fmt: skip
    batch = [{**call, "id": "a", "output": {"nullable": None}}, {**call, "id": "b", "output": None}]
    await http.post("/v2/lab/x/calls/complete", json={"batch": batch})
    rows = (await http.get("/api/external/calls")).json()["rows"]
    assert {row["id"]: row["preview"] for row in rows} == {"a": '{"nullable":null}', "b": ""}


async def test_the_list_filters_sorts_and_counts(http: httpx.AsyncClient) -> None:
    call = {
        "project_id": "lab/x", "id": "a", "trace_id": "a", "op_name": "weave:///lab/x/op/think:1", "attributes": {},
        "started_at": "2026-01-02T00:00:00Z", "ended_at": "2026-01-02T00:00:01Z", "inputs": {"question": "WHY"},
        "output": "because", "summary": {},
    }  # fmt: skip
    inner = {**call, "id": "b", "parent_id": "a", "op_name": "look", "exception": "lost"}
    loop = [{**call, "id": name, "trace_id": "z", "parent_id": parent} for name, parent in (("y", "z"), ("z", "y"))]
    await http.post("/v2/lab/x/calls/complete", json={"batch": [call, inner, *loop]})
    await http.post("/v1/traces", json=request(span("agent", 1)))
    answer = (await http.get("/api/external/calls")).json()
    assert [(row["op_name"], row["source"]) for row in answer["rows"]] == [("think", "weave"), ("agent", "otlp")]
    assert {(one["entity"], one["project"], one["calls"]) for one in answer["projects"]} == {
        ("lab", "x", 1), ("otlp", "agent", 1)
    }  # fmt: skip
    assert answer["rows"][0]["preview"] == "because"
    assert await calls(http, q="why") == ["think"]
    assert await calls(http, entity="lab", project="x", all=True, status="error") == ["look"]
    assert await calls(http, source="otlp") == ["agent"]
    assert await calls(http, op="thi") == ["think"]
    assert await calls(http, sort="op_name") == ["agent", "think"]
    assert (await http.get("/api/external/calls", params={"sort": "id; DROP TABLE calls"})).status_code == 422
    found = (await http.get("/api/external/call", params={"id": "b", "entity": "lab", "project": "x"})).json()
    assert [row["id"] for row in found["tree"]] == ["a", "b"]
    assert (found["call"]["inputs"], found["call"]["exception"]) == ({"question": "WHY"}, "lost")
    assert (await http.get("/api/external/call", params={"id": "z"})).json()["tree"] == [], "no endless walk"
    assert (await http.get("/api/external/call", params={"id": "no"})).status_code == 404


async def test_the_page_is_served_where_weave_links_to(http: httpx.AsyncClient) -> None:
    for path in ("/", "/lab/x", "/lab/x/weave", "/lab/x/r/call/abc", "/lab/x/weave/objects/o/versions/1"):
        answer = await http.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html"), path
    assert (await http.get("/api/nothing")).status_code == 404
