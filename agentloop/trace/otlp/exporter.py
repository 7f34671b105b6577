"""`OtlpExporter`: the destination that `trace.otlp` of a recipe names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from agentloop.config import OtlpConfig
from agentloop.text import hide_secrets
from agentloop.trace.exporting import ExportRun, TracedEpisode
from agentloop.trace.genai import Attributes, NamedSpan, named_spans
from agentloop.trace.otlp.client import Client
from agentloop.trace.otlp.headers import check_headers, check_variable

PATH = "/v1/traces"

REQUEST_CHARACTERS = 2_000_000
"""Of the spans in one request; receivers refuse bodies of many MB. An episode is not split."""

SPAN_CHARACTERS, ATTRIBUTE_CHARACTERS = 80, 16
"""What counts beside texts and names: ids and times of a span, and the number and length of an
attribute."""


class OtlpExporter:
    """See `SpanExporter`. The trace id is the episode's: sent again, its spans stay the same.

    Raises:
        ConfigError: a header of `headers`, or of OpenTelemetry's variable, cannot be sent.
    """

    library: ClassVar[str] = "opentelemetry.exporter.otlp.proto.http"
    extra: ClassVar[str] = "otlp"

    def __init__(self, config: OtlpConfig, run: ExportRun) -> None:
        address = config.endpoint.rstrip("/")
        self._endpoint = address if address.endswith(PATH) else address + PATH
        self.destination = str(hide_secrets(self._endpoint))
        check_headers(config.headers)
        check_variable()
        self._config = config
        self._run = run
        self._client: Client | None = None

    def export(self, episodes: Sequence[TracedEpisode]) -> None:
        """Send episodes in requests of a bounded size.

        Raises:
            ExportError: the receiver did not take all of them.
        """
        if self._client is None:
            config = self._config
            self._client = Client(self._endpoint, self.destination, config.headers, config.timeout_s, self._run.name)
        for spans in self._requests(episodes):
            self._client.send(spans)

    def close(self, timeout_s: float) -> None:
        if self._client is not None:
            self._client.close()

    def _requests(self, episodes: Sequence[TracedEpisode]) -> Iterator[list[tuple[str, NamedSpan]]]:
        """Yield (trace id, span) of as many episodes as fit in one request."""
        spans: list[tuple[str, NamedSpan]] = []
        size = 0
        for episode in episodes:
            named = named_spans(episode, texts=self._config.texts)
            characters = sum([SPAN_CHARACTERS + len(span.name) + _characters(span.own) for span in named])
            characters += len(named) * _characters(named[0].common) if named else 0
            if spans and size + characters > REQUEST_CHARACTERS:
                yield spans
                spans, size = [], 0
            spans += [(episode.trace_id, span) for span in named]
            size += characters
        if spans:
            yield spans


def _characters(attributes: Attributes) -> int:
    """Return about the length of attributes."""
    texts = sum([len(value) for value in attributes.values() if type(value) is str])
    return texts + sum(map(len, attributes)) + ATTRIBUTE_CHARACTERS * len(attributes)
