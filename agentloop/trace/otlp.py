"""The exporter `otlp`: spans to any OpenTelemetry receiver, as OTLP over HTTP in protobuf.

It makes finished spans and hands them to OpenTelemetry's own exporter. It sets up no tracer: one of
the user's own, for instance in a tool, is not touched and does not see them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

from agentloop.config import OtlpConfig
from agentloop.errors import ConfigError, ExportError
from agentloop.text import clean, hide_secrets
from agentloop.trace.exporting import ExportRun, TracedEpisode
from agentloop.trace.genai import NamedSpan, named_spans

if TYPE_CHECKING:
    import requests
    from opentelemetry.sdk.trace import ReadableSpan

PATH = "/v1/traces"

REQUEST_CHARACTERS = 2_000_000
"""Text of the spans in one request; receivers refuse bodies of many MB. An episode is not split."""

REFUSED_CONTENT = frozenset({400, 413, 422})
"""Answers that say that the spans are wrong, not that the receiver cannot be used."""

LONGEST_ANSWER = 200


class OtlpExporter:
    """See `SpanExporter`. The trace id is the episode's: sent again, its spans stay the same.

    Raises:
        ConfigError: no header can hold a value of `headers`.
    """

    library: ClassVar[str] = "opentelemetry.exporter.otlp.proto.http"
    extra: ClassVar[str] = "otlp"

    def __init__(self, config: OtlpConfig, run: ExportRun) -> None:
        address = config.endpoint.rstrip("/")
        self._endpoint = address if address.endswith(PATH) else address + PATH
        self._config = config
        self._run = run
        self.destination = str(hide_secrets(self._endpoint))
        self._check_headers(config.headers)
        self._client: _Client | None = None
        self._closed = False

    def export(self, episodes: Sequence[TracedEpisode]) -> None:
        """Send episodes in requests of a bounded size.

        Raises:
            ExportError: the receiver did not take all of them.
        """
        if self._closed:
            raise ExportError(f"{self.destination}: the exporter is closed")
        if self._client is None:
            self._client = _Client(self._endpoint, self.destination, self._config, self._run)
        for spans in self._requests(episodes):
            self._client.send(spans)

    def close(self, timeout_s: float) -> None:
        self._closed = True
        if self._client is not None:
            self._client.close()

    def _requests(self, episodes: Sequence[TracedEpisode]) -> Iterator[list[tuple[str, NamedSpan]]]:
        """Yield (trace id, span) of as many episodes as fit in one request."""
        spans: list[tuple[str, NamedSpan]] = []
        size = 0
        for episode in episodes:
            named = named_spans(episode, texts=self._config.texts)
            characters = sum(
                len(value) for span in named for value in span.attributes.values() if isinstance(value, str)
            )
            if spans and size + characters > REQUEST_CHARACTERS:
                yield spans
                spans, size = [], 0
            spans += [(episode.trace_id, span) for span in named]
            size += characters
        if spans:
            yield spans

    @staticmethod
    def _check_headers(headers: dict[str, str]) -> None:
        for name, value in headers.items():
            if not (name.isascii() and name.isprintable() and " " not in name and name):
                raise ConfigError(f"trace.otlp.headers has {clean(repr(name), 80)}, which is not the name of a header")
            if not (value.isascii() and value.isprintable()):
                raise ConfigError(
                    f"trace.otlp.headers.{name} has a character that an HTTP header cannot hold",
                    "use printable ASCII characters, without a line break at the end",
                )


class _Client:
    """OpenTelemetry's exporter, with the cause when it fails. Imports its library.

    Args:
        shown: the endpoint as messages name it.
    """

    def __init__(self, endpoint: str, shown: str, config: OtlpConfig, run: ExportRun) -> None:
        from opentelemetry.exporter.otlp.proto.http import Compression
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        # Without a handler of its own, its messages would be printed between those of the run.
        logging.getLogger("opentelemetry.exporter").addHandler(logging.NullHandler())
        self._shown = shown
        self._session = _noting_session()
        self._exporter = OTLPSpanExporter(
            endpoint=endpoint,
            headers=config.headers,
            timeout=config.timeout_s,
            compression=Compression.Gzip,
            session=self._session,
        )
        # The last one is how Phoenix names its project.
        names = {"service.name": "agentloop", "service.instance.id": run.name, "openinference.project.name": run.name}
        self._resource = Resource(names)
        self._scope = InstrumentationScope("agentloop", version("agentloop-rl"))

    def send(self, spans: Sequence[tuple[str, NamedSpan]]) -> None:
        """Send spans with their trace ids.

        Raises:
            ExportError: they did not arrive, or the receiver left some out.
        """
        from opentelemetry.sdk.trace.export import SpanExportResult

        self._session.note = _Note()
        done = self._exporter.export([self._readable(trace_id, span) for trace_id, span in spans])
        note: _Note = self._session.note
        if done is SpanExportResult.SUCCESS:
            rejected, why = note.rejected()
            if rejected:
                raise ExportError(
                    f"{self._shown} left out {rejected} of {len(spans)} spans: {clean(why, LONGEST_ANSWER)}", final=True
                )
            return
        if note.status is None:
            raise ExportError(f"{self._shown} cannot be reached: {note.cause}", "start it, or correct trace.otlp")
        raise ExportError(
            f"{self._shown} answered {note.status}: {clean(note.text, LONGEST_ANSWER)}",
            "correct trace.otlp.headers" if note.status in (401, 403) else None,
            final=note.status in REFUSED_CONTENT,
        )

    def close(self) -> None:
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


class _Note:
    """The last answer to a request, or why there was none."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.text = ""
        self.content = b""
        self.cause = "no answer"

    def rejected(self) -> tuple[int, str]:
        """Return how many spans the receiver left out, and why."""
        from google.protobuf.message import DecodeError
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

        try:
            partial = ExportTraceServiceResponse.FromString(self.content).partial_success
        except DecodeError:  # an answer in another form; the status says that all arrived
            return 0, ""
        return partial.rejected_spans, partial.error_message


def _noting_session() -> Any:
    """Return a `requests.Session` that keeps a note of its last answer."""
    import requests

    class Session(requests.Session):  # type: ignore[misc]  # it has no types
        note = _Note()

        def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
            try:
                answer = super().send(request, **options)
            except requests.RequestException as exc:
                self.note.status, self.note.cause = None, _cause(exc)
                raise
            self.note.status, self.note.content, self.note.text = answer.status_code, answer.content, answer.text
            return answer

    return Session()


def _cause(exc: BaseException) -> str:
    """Return why there was no answer, from the innermost error of the operating system."""
    import requests

    if isinstance(exc, requests.Timeout):
        return "it did not answer in time"
    cause = type(exc).__name__
    inner: BaseException | None = exc
    while inner is not None:
        if isinstance(inner, OSError) and not isinstance(inner, requests.RequestException):
            cause = inner.strerror or type(inner).__name__
        inner = inner.__cause__ or inner.__context__
    return clean(cause, LONGEST_ANSWER)
