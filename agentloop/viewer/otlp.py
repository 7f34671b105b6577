"""Receive OpenTelemetry spans: OTLP over HTTP, in protobuf or JSON, packed or not.

Spans are stored as they come, each once by trace and span id. A span whose ids are wrong is left
out; the answer counts it, as the protocol says.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from agentloop.files import json_line, read_json
from agentloop.viewer.received import Received
from agentloop.web.bodies import in_thread, read_body
from agentloop.web.refusals import Refusal

PATHS = ("/v1/traces", "/otel/v1/traces", "/agents/otel/v1/traces")
"""OpenTelemetry's own path, and those to which weave's client sends spans."""

PROTOBUF = ("application/x-protobuf", "application/protobuf")

DEEPEST = 16
"""Levels of an attribute's value that are read."""

LAST_TIME = 253_402_300_799_000_000
"""The end of the year 9999, in microseconds."""

ERROR = 2
"""The status code of a span that failed."""

_KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")


_HEXADECIMAL = re.compile("[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """A span as the table of spans holds it."""

    trace_id: str
    span_id: str
    parent_id: str | None
    service: str
    name: str
    kind: str
    started_at: int
    ended_at: int | None
    status: str
    message: str | None
    attributes: str
    resource: str
    events: str


def build_router(received: Received) -> APIRouter:
    """Return the routes of the receiver."""
    router = APIRouter()

    async def receive(request: Request) -> Response:
        body = await read_body(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        left_out = await in_thread(body, lambda whole: _receive(received, whole, kind in PROTOBUF))
        return _answer(left_out, kind in PROTOBUF)

    for path in PATHS:
        router.add_api_route(path, receive, methods=["POST"])
    return router


_row = attrgetter(*ReceivedSpan.__slots__)


def _receive(received: Received, body: bytes, protobuf: bool) -> int:
    """Store the spans of a request; return how many were left out."""
    found = list(_protobuf(body) if protobuf else _spans(_json(body)))
    spans = [span for span in found if span is not None]
    if spans:
        rows = [_row(span) for span in spans]
        with received.writing() as connection:
            marks = ", ".join("?" * len(ReceivedSpan.__slots__))
            connection.executemany(f"INSERT OR REPLACE INTO spans VALUES ({marks})", rows)  # noqa: S608  # our names
    return len(found) - len(spans)


def _answer(left_out: int, protobuf: bool) -> Response:
    why = "the ids of a span are 32 and 16 hexadecimal digits, and its times nanoseconds"
    if not protobuf:
        partial = {"rejectedSpans": str(left_out), "errorMessage": why}
        return Response(json_line({"partialSuccess": partial} if left_out else {}), media_type="application/json")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
        ExportTracePartialSuccess,
        ExportTraceServiceResponse,
    )

    answer = ExportTraceServiceResponse()
    if left_out:
        answer.partial_success.CopyFrom(ExportTracePartialSuccess(rejected_spans=left_out, error_message=why))
    return Response(answer.SerializeToString(), media_type=PROTOBUF[0])


def _json(body: bytes) -> Mapping[str, Any]:
    try:
        found = read_json(body)
    except ValueError as exc:
        raise Refusal(400, f"the body is not JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise Refusal(400, "the body must be an ExportTraceServiceRequest in JSON")
    return found


def _protobuf(body: bytes) -> Iterator[ReceivedSpan | None]:
    """Yield the spans of a request in protobuf; None for one that cannot be stored."""
    try:
        from google.protobuf.message import DecodeError
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    except ImportError as exc:
        raise Refusal(
            415, "protobuf needs a library that is not installed here", "pip install 'agentloop-rl[otlp]', or send JSON"
        ) from exc
    try:
        request = ExportTraceServiceRequest.FromString(body)
    except (DecodeError, RecursionError, ValueError) as exc:
        raise Refusal(400, f"the body is not an ExportTraceServiceRequest in protobuf: {exc}") from exc
    # Read field by field: protobuf's own conversion to JSON takes five times as long.
    for of_resource in request.resource_spans:
        facts = _proto_attributes(of_resource.resource.attributes)
        resource = _dump(facts)
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                yield _proto_span(span, facts, resource)


def _proto_span(span: Any, facts: Mapping[str, Any], resource: str) -> ReceivedSpan | None:
    trace_id, span_id, parent = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
    if not _is_id(trace_id, 32) or not _is_id(span_id, 16) or not span.start_time_unix_nano:
        return None
    started, ended = _microseconds(span.start_time_unix_nano), _microseconds(span.end_time_unix_nano)
    return ReceivedSpan(
        trace_id=trace_id,
        span_id=span_id,
        parent_id=parent if _is_id(parent, 16) else None,
        service=str(facts.get("service.name") or "unknown"),
        name=span.name,
        kind=_kind(span.kind),
        started_at=started,
        ended_at=max(started, ended) if ended else None,
        status="error" if span.status.code == ERROR else "ok",
        message=span.status.message or None,
        attributes=_dump(_proto_attributes(span.attributes)),
        resource=resource,
        events=_dump(
            [
                {"name": event.name, "at": _microseconds(event.time_unix_nano), **_proto_attributes(event.attributes)}
                for event in span.events
            ]
        ),
    )


def _proto_attributes(attributes: Iterable[Any]) -> dict[str, Any]:
    return {item.key: _proto_value(item.value, 0) for item in attributes}


def _proto_value(value: Any, depth: int) -> Any:
    """Return an `AnyValue` of protobuf as a value of JSON."""
    kind = value.WhichOneof("value")
    if kind is None or depth > DEEPEST:
        return None
    inner = getattr(value, kind)
    if kind == "array_value":
        return [_proto_value(item, depth + 1) for item in inner.values]
    if kind == "kvlist_value":
        return {item.key: _proto_value(item.value, depth + 1) for item in inner.values}
    if kind == "bytes_value":
        return inner.hex()
    if isinstance(inner, float) and not math.isfinite(inner):
        return "NaN" if math.isnan(inner) else "Infinity" if inner > 0 else "-Infinity"  # as in OTLP's JSON
    return inner


def _items(request: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """Yield (resource, span)."""
    for of_resource in _list(request, "resourceSpans"):
        resource = of_resource.get("resource")
        for of_scope in _list(of_resource, "scopeSpans"):
            for span in _list(of_scope, "spans"):
                yield resource if isinstance(resource, Mapping) else {}, span


def _list(holder: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = holder.get(key)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _spans(request: Mapping[str, Any]) -> Iterator[ReceivedSpan | None]:
    """Yield the spans of a request; None for one that cannot be stored."""
    for resource, span in _items(request):
        trace_id, span_id = (str(span.get(key, "")).lower() for key in ("traceId", "spanId"))
        started = _time(span.get("startTimeUnixNano"))
        if not _is_id(trace_id, 32) or not _is_id(span_id, 16) or started is None:
            yield None
            continue
        parent = str(span.get("parentSpanId") or "").lower()
        facts = _attributes(resource)
        status = span.get("status") if isinstance(span.get("status"), dict) else {}
        assert isinstance(status, dict)
        ended = _time(span.get("endTimeUnixNano"))
        yield ReceivedSpan(
            trace_id=trace_id,
            span_id=span_id,
            parent_id=parent if _is_id(parent, 16) else None,
            service=str(facts.get("service.name") or "unknown"),
            name=str(span.get("name") or ""),
            kind=_kind(span.get("kind")),
            started_at=started,
            ended_at=None if not ended else max(started, ended),
            status="error" if status.get("code") in (ERROR, "STATUS_CODE_ERROR") else "ok",
            message=str(status["message"]) if status.get("message") else None,
            attributes=_dump(_attributes(span)),
            resource=_dump(facts),
            events=_dump(
                [
                    {"name": str(event.get("name") or ""), "at": _time(event.get("timeUnixNano")), **_attributes(event)}
                    for event in _list(span, "events")
                ]
            ),
        )


def _attributes(holder: Mapping[str, Any]) -> dict[str, Any]:
    return {str(item.get("key")): _value(item.get("value"), 0) for item in _list(holder, "attributes")}


def _value(value: Any, depth: int) -> Any:
    """Return an `AnyValue` as a value of JSON."""
    if not isinstance(value, dict) or depth > DEEPEST:
        return None
    ((kind, inner),) = value.items() if len(value) == 1 else (("", None),)
    if kind == "intValue":
        return int(str(inner)) if re.fullmatch(r"-?\d{1,19}", str(inner)) else None
    if kind == "arrayValue":
        return [_value(item, depth + 1) for item in _list(inner if isinstance(inner, dict) else {}, "values")]
    if kind == "kvlistValue":
        items = _list(inner if isinstance(inner, dict) else {}, "values")
        return {str(item.get("key")): _value(item.get("value"), depth + 1) for item in items}
    if kind == "bytesValue":
        try:
            return base64.b64decode(str(inner), validate=True).hex()
        except (binascii.Error, ValueError):
            return None
    return inner if isinstance(inner, str | bool | int | float) else None


def _time(value: Any) -> int | None:
    """Return nanoseconds, an integer or its digits, as microseconds."""
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,20}", str(value)):
        return None
    return _microseconds(int(value))


def _microseconds(nanoseconds: int) -> int:
    return min(nanoseconds // 1000, LAST_TIME)


def _kind(value: Any) -> str:
    if isinstance(value, int) and 0 <= value < len(_KINDS):
        return _KINDS[value]
    name = str(value).removeprefix("SPAN_KIND_").lower()
    return name if name in _KINDS else "unspecified"


def _is_id(value: str, digits: int) -> bool:
    return len(value) == digits and _HEXADECIMAL.fullmatch(value) is not None and value.strip("0") != ""


def _dump(value: Any) -> str:
    return json_line(value).decode().rstrip("\n")
