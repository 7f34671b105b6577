"""`Client`: sends spans as OTLP over HTTP in protobuf, and says whether they arrived.

It makes finished spans and hands them to OpenTelemetry's own exporter. It sets up no tracer: one of
the user's own, for instance in a tool, is not touched and does not see them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from agentloop.errors import ExportError
from agentloop.trace.genai import NamedSpan
from agentloop.trace.otlp.answer import Answer
from agentloop.wire import is_local

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

REFUSED_CONTENT = frozenset({400, 413, 422})
"""Answers that say that the spans are wrong, not that the receiver cannot be used."""

_NOWHERE = logging.NullHandler()


class Client:
    """OpenTelemetry's exporter, with the cause when it fails. Imports its library.

    Args:
        endpoint: with its path.
        shown: the same as messages name it.
        run_name: the spans' resource has it.
    """

    def __init__(self, endpoint: str, shown: str, headers: Mapping[str, str], timeout_s: float, run_name: str) -> None:
        from opentelemetry.exporter.otlp.proto.http import Compression
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        from agentloop.trace.otlp.session import Session

        # Its messages would be printed between those of the run; some show headers.
        silenced = logging.getLogger("opentelemetry")
        silenced.addHandler(_NOWHERE)
        silenced.propagate = False
        self._shown = shown
        self._session = Session(timeout_s)
        self._exporter = OTLPSpanExporter(
            endpoint=endpoint,
            headers=dict(headers),
            timeout=timeout_s,
            # On this machine, packing and unpacking take longer than what they save.
            compression=Compression.NoCompression if is_local(endpoint) else Compression.Gzip,
            session=self._session,
        )
        # The last one is how Phoenix names its project.
        names = {"service.name": "agentloop", "service.instance.id": run_name, "openinference.project.name": run_name}
        self._resource = Resource(names)
        self._scope = InstrumentationScope("agentloop", version("agentloop-rl"))

    def send(self, spans: Sequence[tuple[str, NamedSpan]]) -> None:
        """Send spans with their trace ids.

        Raises:
            ExportError: they did not arrive, or the receiver left some out.
        """
        self._session.answer = answer = Answer()
        self._exporter.export([self._readable(trace_id, span) for trace_id, span in spans])
        if answer.status is None:
            raise ExportError(f"{self._shown} cannot be reached: {answer.cause}", "start it, or correct trace.otlp")
        # OpenTelemetry's exporter takes every status below 400 as success.
        if 300 <= answer.status < 400:
            raise ExportError(f"{self._shown} redirects to {answer.target}", "correct trace.otlp.endpoint")
        if not 200 <= answer.status < 300:
            raise ExportError(
                f"{self._shown} answered {answer.status}: {answer.shown(answer.text)}",
                "correct trace.otlp.headers" if answer.status in (401, 403) else None,
                final=answer.status in REFUSED_CONTENT,
            )
        try:
            rejected, why = answer.rejected()
        except (TypeError, ValueError) as exc:
            raise ExportError(
                f"{self._shown} answered {answer.status}, but not as a receiver of spans: {answer.shown(answer.text)}",
                "correct trace.otlp.endpoint",
            ) from exc
        if rejected:
            raise ExportError(
                f"{self._shown} left out {rejected} of {len(spans)} spans: {answer.shown(why)}", final=True
            )

    def close(self) -> None:
        """Release the connection; a request in another thread is not repeated."""
        self._exporter.shutdown()

    def _readable(self, trace_id: str, named: NamedSpan) -> ReadableSpan:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        span, trace = named.span, int(trace_id, 16)
        sampled = TraceFlags(TraceFlags.SAMPLED)
        parent = span.parent_id and SpanContext(trace, int(span.parent_id, 16), is_remote=False, trace_flags=sampled)
        # A cancelled span has no status of its own in OpenTelemetry.
        failed = span.status != "ok"
        status = Status(StatusCode.ERROR, span.error or span.status) if failed else Status(StatusCode.OK)
        return ReadableSpan(
            named.name,
            context=SpanContext(trace, int(span.span_id, 16), is_remote=False, trace_flags=sampled),
            parent=parent or None,
            resource=self._resource,
            attributes=named.attributes,
            kind=SpanKind.CLIENT if named.kind == "client" else SpanKind.INTERNAL,
            status=status,
            start_time=span.start_ns,
            end_time=max(span.start_ns, span.end_ns),
            instrumentation_scope=self._scope,
        )
