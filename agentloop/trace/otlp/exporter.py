"""`OtlpExporter`: the destination that `trace.otlp` of a recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from agentloop.config import OtlpConfig
from agentloop.errors import ConfigError
from agentloop.text import clean, hide_secrets
from agentloop.trace.exporting import ExportRun, TracedEpisode
from agentloop.trace.sender import SenderProcess

PATH = "/v1/traces"

MODULE = "agentloop.trace.otlp.sending"


class OtlpExporter:
    """See `SpanExporter`. The trace id is the episode's: sent again, its spans stay the same.

    Raises:
        ConfigError: no header can hold a value of `headers`.
    """

    library: ClassVar[str] = "opentelemetry.exporter.otlp.proto.http"
    extra: ClassVar[str] = "otlp"

    def __init__(self, config: OtlpConfig, run: ExportRun) -> None:
        address = config.endpoint.rstrip("/")
        endpoint = address if address.endswith(PATH) else address + PATH
        self.destination = str(hide_secrets(endpoint))
        _check_headers(config.headers)
        settings = {
            "endpoint": endpoint,
            "shown": self.destination,
            "headers": config.headers,
            "timeout_s": config.timeout_s,
            "texts": config.texts,
        }
        self._process = SenderProcess("otlp", MODULE, settings, run)

    def export(self, episodes: Sequence[TracedEpisode]) -> None:
        """Send episodes in requests of a bounded size.

        Raises:
            ExportError: the receiver did not take all of them.
        """
        self._process.send(episodes)

    def finish(self) -> None:
        self._process.finish()

    def close(self, timeout_s: float) -> None:
        self._process.close()


def _check_headers(headers: dict[str, str]) -> None:
    for name, value in headers.items():
        if not (name.isascii() and name.isprintable() and " " not in name and name):
            raise ConfigError(f"trace.otlp.headers has {clean(repr(name), 80)}, which is not the name of a header")
        if not (value.isascii() and value.isprintable()):
            raise ConfigError(
                f"trace.otlp.headers.{name} has a character that an HTTP header cannot hold",
                "use printable ASCII characters, without a line break at the end",
            )
