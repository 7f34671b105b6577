"""`Client`: sends spans as OTLP over HTTP in protobuf, and says whether they arrived.

It makes finished spans and hands them to OpenTelemetry's own exporter. It sets up no tracer: one of
the user's own, for instance in a tool, is not touched and does not see them.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import orjson

from agentloop.errors import ExportError
from agentloop.text import clean, hide_secrets, hide_values
from agentloop.trace.genai import NamedSpan
from agentloop.wire import is_local

if TYPE_CHECKING:
    import requests
    from opentelemetry.sdk.trace import ReadableSpan

REFUSED_CONTENT = frozenset({400, 413, 422})
"""Answers that say that the spans are wrong, not that the receiver cannot be used."""

LONGEST_ANSWER = 200

ANSWER_BYTES = 2**16
"""What is read of an answer: a receiver's own has less than 1 kB."""

PLAIN_HEADERS = frozenset(
    {"accept", "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "user-agent"}
)
"""Headers of a request that hold no secret; the values of all others are hidden in messages."""


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

        # Without a handler of its own, its messages would be printed between those of the run.
        logging.getLogger("opentelemetry.exporter").addHandler(logging.NullHandler())
        self._shown = shown
        self._session = _noting_session()
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
        self._session.note = _Note()
        self._exporter.export([self._readable(trace_id, span) for trace_id, span in spans])
        note: _Note = self._session.note
        if note.status is None:
            raise ExportError(f"{self._shown} cannot be reached: {note.cause}", "start it, or correct trace.otlp")
        # OpenTelemetry's exporter takes every status below 400 as success.
        if 300 <= note.status < 400:
            raise ExportError(f"{self._shown} redirects to {note.target}", "correct trace.otlp.endpoint")
        if not 200 <= note.status < 300:
            raise ExportError(
                f"{self._shown} answered {note.status}: {note.shown(note.text)}",
                "correct trace.otlp.headers" if note.status in (401, 403) else None,
                final=note.status in REFUSED_CONTENT,
            )
        try:
            rejected, why = note.rejected()
        except (TypeError, ValueError) as exc:
            raise ExportError(
                f"{self._shown} answered {note.status}, but not as a receiver of spans: {note.shown(note.text)}",
                "correct trace.otlp.endpoint",
            ) from exc
        if rejected:
            raise ExportError(f"{self._shown} left out {rejected} of {len(spans)} spans: {note.shown(why)}", final=True)

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


class _Note:
    """The last answer to a request, or why there was none."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.content = b""
        self.kind = ""
        self.target = ""
        self.cause = "no answer"
        self.secrets: list[str] = []

    @property
    def text(self) -> str:
        """The answer as text."""
        return self.content.decode("utf-8", "replace")

    def shown(self, text: str) -> str:
        """Return a text of the receiver for a message; it may echo the request's headers."""
        return clean(hide_values(text, self.secrets), LONGEST_ANSWER)

    def take(self, request: requests.PreparedRequest, answer: requests.Response, content: bytes) -> None:
        """Note an answer and what of its request is secret."""
        headers = request.headers.items()
        self.secrets = [str(value) for name, value in headers if name.lower() not in PLAIN_HEADERS]
        self.content, self.kind = content, answer.headers.get("content-type", "").lower()
        self.target = self.shown(answer.headers.get("location", "an address that it does not name").partition("?")[0])
        self.target = str(hide_secrets(self.target))
        self.status = answer.status_code

    def rejected(self) -> tuple[int, str]:
        """Return how many spans the receiver left out, and why.

        Raises:
            ValueError: the answer is neither protobuf nor JSON, too long to be either, or has
                another number in it.
        """
        from google.protobuf.message import DecodeError
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

        if not self.content:
            return 0, ""
        if len(self.content) > ANSWER_BYTES:
            raise ValueError("the answer is too long")
        try:
            data = orjson.loads(self.content)
        except orjson.JSONDecodeError:
            if self.kind.startswith("text/"):  # some texts can be read as protobuf
                raise
        else:
            partial = data.get("partialSuccess") if isinstance(data, dict) else None
            found = partial if isinstance(partial, dict) else {}
            rejected = found.get("rejectedSpans") or 0  # JSON of protobuf has such numbers as text
            if type(rejected) not in (int, str) or int(rejected) < 0:
                raise ValueError("the number of spans left out is not a number of spans")
            return int(rejected), str(found.get("errorMessage") or "")
        try:
            answer = ExportTraceServiceResponse.FromString(self.content).partial_success
        except DecodeError as exc:
            raise ValueError("the answer is not protobuf") from exc
        if answer.rejected_spans < 0:
            raise ValueError("the number of spans left out is negative")
        return answer.rejected_spans, answer.error_message


def _noting_session() -> Any:
    """Return a `requests.Session` that keeps a note of its last answer, and reads no more of it
    than `ANSWER_BYTES`."""
    import requests

    class Session(requests.Session):  # type: ignore[misc]  # it has no types
        note = _Note()

        def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
            self.note.status = None
            limit = options.get("timeout")
            end = time.monotonic() + limit if isinstance(limit, int | float) else None
            try:
                answer = super().send(request, **{**options, "stream": True})
                content = _read(answer, end)
            except requests.RequestException as exc:
                self.note.cause = _cause(exc)
                raise
            answer._content, answer._content_consumed = content, True
            self.note.take(request, answer, content)
            return answer

        def get_redirect_target(self, resp: requests.Response) -> None:
            """Follow no redirect; requests would also read the whole answer."""

    return Session()


def _read(answer: requests.Response, end: float | None) -> bytes:
    """Return the beginning of an answer: all of it, or one byte more than `ANSWER_BYTES`.

    Raises:
        requests.RequestException: the connection broke, or the time is over.
    """
    import requests
    from urllib3.exceptions import HTTPError, ReadTimeoutError

    content = b""
    # `read` waits until it has all that it was asked for, however slowly that comes.
    read = getattr(answer.raw, "read1", answer.raw.read)
    try:
        while len(content) <= ANSWER_BYTES and (part := read(ANSWER_BYTES + 1 - len(content), decode_content=False)):
            content += part
            if end is not None and time.monotonic() > end:
                raise requests.Timeout("the answer does not end")
        if len(content) > ANSWER_BYTES:
            answer.close()
        elif answer.headers.get("content-encoding", "").lower() in ("gzip", "deflate"):
            content = zlib.decompressobj(32 + zlib.MAX_WBITS).decompress(content, ANSWER_BYTES + 1)
    except ReadTimeoutError as exc:
        raise requests.Timeout(exc) from exc
    except (HTTPError, zlib.error) as exc:
        raise requests.ConnectionError(exc) from exc
    return content


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
