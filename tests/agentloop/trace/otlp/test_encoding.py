"""`EncodedSpans` beside OpenTelemetry's own encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from agentloop.trace.exporting import ExportRun, TracedEpisode, episodes_of
from agentloop.trace.genai import NamedSpan, named_spans
from agentloop.trace.otlp.encoding import EncodedSpans, take_encoded_spans
from tests.agentloop.trace.made_episodes import record, step_of

RESOURCE, SCOPE = {"service.name": "agentloop"}, ("agentloop", "1")
SAMPLED = TraceFlags(TraceFlags.SAMPLED)


@pytest.fixture
def run(tmp_path: Path) -> ExportRun:
    return ExportRun("demo", tmp_path, "models/small", rollout_n=2)


def readable(trace_id: str, named: NamedSpan) -> ReadableSpan:
    span, trace = named.span, int(trace_id, 16)
    failed = span.status != "ok"
    return ReadableSpan(
        named.name,
        context=SpanContext(trace, int(span.span_id, 16), False, SAMPLED),
        parent=SpanContext(trace, int(span.parent_id, 16), False, SAMPLED) if span.parent_id else None,
        resource=Resource(RESOURCE),
        attributes={**named.common, **named.own},
        kind=SpanKind.CLIENT if named.kind == "client" else SpanKind.INTERNAL,
        status=Status(StatusCode.ERROR, span.error or span.status) if failed else Status(StatusCode.OK),
        start_time=span.start_ns,
        end_time=max(span.start_ns, span.end_ns),
        instrumentation_scope=InstrumentationScope(*SCOPE),
    )


def spans_of(episodes: list[TracedEpisode]) -> list[tuple[str, NamedSpan]]:
    return [(episode.trace_id, named) for episode in episodes for named in named_spans(episode)]


def strange(run: ExportRun) -> list[TracedEpisode]:
    failed, odd = record(1, "g 語", text="語 \ud800"), record(1, "other", 1)
    tool = next(span for span in failed.trajectory.spans if span.name == "tool")
    tool.status, tool.error = "error", "ValueError: division by zero"
    failed.trajectory.spans[1].status = "cancelled"
    odd.trajectory.spans[2].attributes.update(step=99, flag=True, number=1.5, minus=-7, text="é", large=2**63 - 1)
    odd.trajectory.spans[3].end_ns = odd.trajectory.spans[3].start_ns - 5
    return list(episodes_of(run, [*step_of(1, 3), failed, odd]))


def test_it_writes_what_opentelemetry_writes(run: ExportRun) -> None:
    spans = spans_of(strange(run))
    assert EncodedSpans(RESOURCE, SCOPE, spans).request == encode_spans([readable(*span) for span in spans])


@pytest.mark.parametrize("value", [2**63, "\ud800", object()])
def test_an_attribute_that_cannot_be_encoded_is_left_out(run: ExportRun, value: Any) -> None:
    spans = spans_of(list(episodes_of(run, [record()])))
    expected = EncodedSpans(RESOURCE, SCOPE, spans).request
    spans[0][1].common["shared"] = spans[2][1].own["one"] = value
    assert EncodedSpans(RESOURCE, SCOPE, spans).request == expected


def test_spans_of_a_tracer_are_encoded_as_before(run: ExportRun) -> None:
    take_encoded_spans()
    take_encoded_spans()
    spans = [readable(*span) for span in spans_of(strange(run))]
    assert trace_exporter.encode_spans(spans) == encode_spans(spans)
    assert len(EncodedSpans(RESOURCE, SCOPE, spans_of(strange(run)))) == len(spans)
