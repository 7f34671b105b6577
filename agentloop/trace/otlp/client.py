"""`Client`: sends spans as OTLP over HTTP in protobuf, and says whether they arrived.

It hands finished spans to OpenTelemetry's own exporter, encoded. It sets up no tracer: one of the
user's own, for instance in a tool, is not touched and does not see them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from agentloop.errors import ExportError
from agentloop.trace.genai import NamedSpan
from agentloop.trace.otlp.answer import Answer
from agentloop.wire import is_local

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

        from agentloop.trace.otlp.encoding import EncodedSpans, take_encoded_spans
        from agentloop.trace.otlp.session import Session

        # Its messages would be printed between those of the run; some show headers.
        silenced = logging.getLogger("opentelemetry")
        silenced.addHandler(_NOWHERE)
        silenced.propagate = False
        self._shown = shown
        self._timeout_s = timeout_s
        self._session = Session(timeout_s)
        self._exporter = OTLPSpanExporter(
            endpoint=endpoint,
            headers=dict(headers),
            timeout=timeout_s,
            # On this machine, packing and unpacking take longer than what they save.
            compression=Compression.NoCompression if is_local(endpoint) else Compression.Gzip,
            session=self._session,
        )
        take_encoded_spans()
        # The last one is how Phoenix names its project.
        names = {"service.name": "agentloop", "service.instance.id": run_name, "openinference.project.name": run_name}
        self._encode = functools.partial(EncodedSpans, names, ("agentloop", version("agentloop-rl")))

    def send(self, spans: Sequence[tuple[str, NamedSpan]]) -> None:
        """Send spans with their trace ids.

        Raises:
            ExportError: they did not arrive, or the receiver left some out.
            ValueError, TypeError, OverflowError: a span cannot be encoded.
        """
        self._session.answer = answer = Answer()
        self._exporter.export(self._encode(spans))
        if answer.status is None and answer.late and answer.reached:
            raise ExportError(
                f"{self._shown} was reached, but sent {answer.cause} (trace.otlp.timeout_s)",
                "raise trace.otlp.timeout_s, or lower the load of the receiver",
            )
        if answer.status is None and answer.late:
            raise ExportError(
                f"{self._shown} cannot be reached: no connection within {self._timeout_s:g} s (trace.otlp.timeout_s)",
                "start it, or correct trace.otlp",
                unreachable=True,
            )
        if answer.status is None:
            raise ExportError(
                f"{self._shown} cannot be reached: {answer.cause}",
                "start it, or correct trace.otlp",
                unreachable=not answer.reached,
            )
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
