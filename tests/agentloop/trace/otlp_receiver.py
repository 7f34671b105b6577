"""An OTLP receiver in this process."""

from __future__ import annotations

import contextlib
import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


class Receiver:
    """An OTLP receiver: spans by name, one for each id, as Jaeger and others keep them."""

    def __init__(self) -> None:
        self.spans: dict[tuple[str, str], Any] = {}
        self.requests: list[tuple[str, dict[str, str], int]] = []
        self.status = 200
        self.rejects = 0
        self.answer: bytes | None = None
        self.answer_headers: dict[str, str] = {}
        self.endless = False
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {key.lower(): value for key, value in self.headers.items()}
                receiver.requests.append((self.path, headers, len(body)))
                answer = ExportTraceServiceResponse()
                if receiver.status == 200:
                    receiver.take(gzip.decompress(body) if "content-encoding" in headers else body)
                    if receiver.rejects:
                        answer.partial_success.rejected_spans = receiver.rejects
                        answer.partial_success.error_message = "too old"
                content = answer.SerializeToString() if receiver.status == 200 else b"no \x1b[31m way"
                content = content if receiver.answer is None else receiver.answer
                self.send_response(receiver.status)
                for name, value in receiver.answer_headers.items():
                    self.send_header(name, value)
                if not receiver.endless:
                    self.send_header("content-length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(content)
                    while receiver.endless:
                        self.wfile.write(b" " * 2**14)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans[span.trace_id.hex(), span.span_id.hex()] = span

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans.values() if span.name == name]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def plain(span: Any) -> dict[str, Any]:
    """The attributes of a decoded span."""

    def value(any_value: Any) -> Any:
        kind = any_value.WhichOneof("value")
        found = getattr(any_value, kind)
        return [value(item) for item in found.values] if kind == "array_value" else found

    return {entry.key: value(entry.value) for entry in span.attributes}
