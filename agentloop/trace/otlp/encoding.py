"""Spans as the protobuf that OpenTelemetry's exporter sends.

Its own encoder makes a message for each attribute and copies it at each level, which took three
quarters of the time of sending. Here the messages are filled in place, and the attributes that all
spans of an episode have are encoded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span, SpanFlags, Status

from agentloop.trace.genai import Attributes, NamedSpan

_KINDS = {"internal": Span.SPAN_KIND_INTERNAL, "client": Span.SPAN_KIND_CLIENT}
_FLAGS = SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
_OK = Status(code=Status.STATUS_CODE_OK)


class EncodedSpans(Sequence[Span]):
    """Spans of one request, which the exporter takes in place of its own.

    Args:
        resource: attributes of what the spans belong to.
        scope: name and version of what recorded them.
        spans: with their trace ids.

    Raises:
        ValueError, TypeError, OverflowError: a span's ids, name, times or error cannot be encoded.
            An attribute that cannot is left out.
    """

    def __init__(
        self, resource: Mapping[str, str], scope: tuple[str, str], spans: Sequence[tuple[str, NamedSpan]]
    ) -> None:
        self.request = ExportTraceServiceRequest()
        found: ResourceSpans = self.request.resource_spans.add()
        _add(found.resource.attributes, resource)
        scope_spans = found.scope_spans.add()
        scope_spans.scope.name, scope_spans.scope.version = scope
        self._spans = scope_spans.spans
        common: Attributes = {}
        encoded = b""
        for trace_id, named in spans:
            if named.common is not common:
                common, encoded = named.common, _encoded(named.common)
            _fill(self._spans.add(), trace_id, named, encoded)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: Any) -> Any:
        return self._spans[index]


def take_encoded_spans() -> None:
    """Let OpenTelemetry's exporter take `EncodedSpans`; spans of tracers are encoded as before."""
    encode = trace_exporter.encode_spans
    if hasattr(encode, "_takes_encoded"):
        return

    def encode_spans(spans: Any) -> Any:
        return spans.request if isinstance(spans, EncodedSpans) else encode(spans)

    encode_spans._takes_encoded = True  # type: ignore[attr-defined]
    trace_exporter.encode_spans = encode_spans


def _fill(message: Span, trace_id: str, named: NamedSpan, common: bytes) -> None:
    span = named.span
    message.MergeFromString(common)
    message.trace_id, message.span_id = int(trace_id, 16).to_bytes(16), int(span.span_id, 16).to_bytes(8)
    if span.parent_id:
        message.parent_span_id = int(span.parent_id, 16).to_bytes(8)
    message.name, message.kind, message.flags = named.name, _KINDS[named.kind], _FLAGS
    message.start_time_unix_nano, message.end_time_unix_nano = span.start_ns, max(span.start_ns, span.end_ns)
    if span.status == "ok":
        message.status.CopyFrom(_OK)
    else:  # a cancelled span has no status of its own in OpenTelemetry
        message.status.code, message.status.message = Status.STATUS_CODE_ERROR, span.error or span.status
    _add(message.attributes, named.own)


def _encoded(attributes: Attributes) -> bytes:
    """Return attributes as part of the bytes of a span."""
    message = Span()
    _add(message.attributes, attributes)
    data: bytes = message.SerializeToString()
    return data


def _add(attributes: Any, values: Mapping[str, Any]) -> None:
    """Add attributes; one that cannot be encoded is left out, as by OpenTelemetry's exporter."""
    for key, value in values.items():
        try:
            attribute = attributes.add()
            attribute.key = key
            _set(attribute.value, value)
        except (ValueError, TypeError):
            del attributes[-1]


def _set(message: AnyValue, value: Any) -> None:
    """Set a value: text, a number, a boolean, or a list of them."""
    if isinstance(value, str):
        message.string_value = value
    elif isinstance(value, bool):
        message.bool_value = value
    elif isinstance(value, int):
        message.int_value = value
    elif isinstance(value, float):
        message.double_value = value
    elif isinstance(value, list):
        message.array_value.SetInParent()
        for item in value:
            _set(message.array_value.values.add(), item)
    elif value is not None:
        raise TypeError(f"an attribute cannot be a {type(value).__name__}")
