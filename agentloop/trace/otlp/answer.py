"""`Answer`: what a receiver of spans answered, and whether that confirms them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from agentloop.text import clean, hide_secrets, hide_values

LONGEST_SHOWN = 200

ANSWER_BYTES = 2**16
"""What is read of an answer: a receiver's own has less than 1 kB."""

PLAIN_HEADERS = frozenset(
    {"accept", "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "user-agent"}
)
"""Headers of a request that hold no secret; the values of all others are hidden in messages."""


class Answer:
    """The last answer to a request, or why there was none.

    Attributes:
        cause: why there was none.
        reached: whether a connection to the receiver was made.
        late: whether the time of the request was over.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self.content = b""
        self.kind = ""
        self.target = ""
        self.cause = "no answer"
        self.reached = True
        self.late = False
        self.secrets: list[str] = []

    @property
    def text(self) -> str:
        """The answer as text."""
        return self.content.decode("utf-8", "replace")

    def shown(self, text: str) -> str:
        """Return a text of the receiver for a message; it may echo the request's headers."""
        return clean(hide_values(text, self.secrets), LONGEST_SHOWN)

    def take(
        self, sent: Iterable[tuple[str, str | bytes]], status: int, headers: Mapping[str, str], content: bytes
    ) -> None:
        """Note an answer, and what is secret of the headers of its request."""
        self.secrets = [str(value) for name, value in sent if name.lower() not in PLAIN_HEADERS]
        self.content, self.kind = content, headers.get("content-type", "").lower()
        self.target = self.shown(headers.get("location", "an address that it does not name").partition("?")[0])
        self.target = str(hide_secrets(self.target))
        self.status = status

    def rejected(self) -> tuple[int, str]:
        """Return how many spans the receiver left out, and why.

        The answer of a receiver is an ExportTraceServiceResponse, in protobuf or JSON. Most are
        empty, as protobuf writes a message without fields.

        Raises:
            ValueError: it is another message, too long to be one, or has another number in it.
        """
        if not self.content:
            return 0, ""
        if len(self.content) > ANSWER_BYTES:
            raise ValueError("the answer is too long")
        try:
            data = orjson.loads(self.content)
        except orjson.JSONDecodeError:
            if self.kind.startswith("text/") or "json" in self.kind:  # some texts can be read as protobuf
                raise
            return self._of_protobuf()
        return _of_json(data)

    def _of_protobuf(self) -> tuple[int, str]:
        from google.protobuf.message import DecodeError
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

        try:
            message = ExportTraceServiceResponse.FromString(self.content)
        except DecodeError as exc:
            raise ValueError("the answer is not protobuf") from exc
        # Fields of later versions may stand alone. Few texts can be read as such, but some can.
        if not message.HasField("partial_success") and "protobuf" not in self.kind:
            raise ValueError("the answer is another message")
        partial = message.partial_success
        if partial.rejected_spans < 0:
            raise ValueError("the number of spans left out is negative")
        return partial.rejected_spans, partial.error_message


def _of_json(data: Any) -> tuple[int, str]:
    """Read an answer in JSON. Some receivers write names as protobuf does, with underscores.

    Raises:
        ValueError: it is not a receiver's answer.
    """
    if not isinstance(data, dict):
        raise ValueError("the answer is not an object")
    partial = _field(data, "partialSuccess", "partial_success")
    if partial is None and not data.keys() <= {"partialSuccess", "partial_success"}:
        raise ValueError("the answer is another object")
    if partial is not None and not isinstance(partial, dict):
        raise ValueError("partialSuccess is not an object")
    found = partial or {}
    rejected = _field(found, "rejectedSpans", "rejected_spans") or 0  # JSON of protobuf has such numbers as text
    if type(rejected) not in (int, str) or int(rejected) < 0:
        raise ValueError("the number of spans left out is not a number of spans")
    return int(rejected), str(_field(found, "errorMessage", "error_message") or "")


def _field(data: Mapping[str, Any], *names: str) -> Any:
    """Return the value of a field under the first of its names that has one."""
    return next((data[name] for name in names if data.get(name) is not None), None)
