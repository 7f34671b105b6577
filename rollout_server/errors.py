"""The server's error tree, and the table of HTTP answers to errors.

ServingError
├── EngineError            500  the engine failed a correct request: sending it again may succeed
│   ├── ReplicaGone        500  the replica no longer answers: another one can take the request
│   └── NotServing         503  a health check found nothing that serves
├── Overloaded             503  the queue is full, with Retry-After
├── WeightsError           400  the weights of an update cannot be served; the old version stays
└── RequestError           400  the request is wrong: sending it again cannot help
    ├── Unauthorized       401
    ├── Forbidden          403
    ├── Conflict           409  the request does not fit the server's state
    ├── UnknownImage       409  the request names an image that is not kept: send it whole
    ├── TooLarge           413
    ├── UnsupportedMediaType 415
    └── Refused            4xx  a server behind this one refused, with its own status

Every 4xx and 5xx answer carries `{"success": false, "message", "error": {"message", "field",
"type"}}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from agentloop.errors import AgentloopError
from agentloop.wire import UNKNOWN_IMAGE


class ServingError(AgentloopError):
    """Root of the errors that a request can end with.

    Args:
        message: what is wrong, and what to do about it.
        field: the field of the request at fault, if it is one.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.message, self.field))


class EngineError(ServingError):
    """The engine failed a correct request: the caller may send it again."""


class ReplicaGone(EngineError):
    """The replica no longer answers; the request is correct and can be sent to another replica."""


class NotServing(EngineError):
    """A health check found no replica that serves, or one that samples nothing."""


class Overloaded(ServingError):
    """The queue is full; the client may retry after `retry_after_s` seconds."""

    def __init__(self, in_flight: int, retry_after_s: float) -> None:
        super().__init__(f"{in_flight} requests are in flight, which is the limit")
        self.in_flight = in_flight
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.in_flight, self.retry_after_s))


class WeightsError(ServingError):
    """Weights cannot be served; the old version stays in service."""


class RequestError(ServingError):
    """The request is wrong, for instance has an unreadable image. Do not send it again."""


class Unauthorized(RequestError):
    """The bearer token is missing or wrong."""


class Forbidden(RequestError):
    """The request names a path that this server must not use."""


class Conflict(RequestError):
    """The request is well-formed but does not fit the server's current state or engine."""


class UnknownImage(RequestError):
    """The request names an image that the server does not keep: send it again with whole images."""


class TooLarge(RequestError):
    """The request's body is larger than the limit."""


class UnsupportedMediaType(RequestError):
    """The request's body is declared as something other than JSON."""


class Refused(RequestError):
    """Another server refused a request that was passed on to it, with `status`."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message, field)
        self.status = status

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.status, self.message, self.field))


ANSWERS: dict[type[ServingError], tuple[int, str]] = {
    EngineError: (500, "engine_error"),
    NotServing: (503, "engine_error"),
    Overloaded: (503, "overloaded"),
    WeightsError: (400, "invalid_request"),
    RequestError: (400, "invalid_request"),
    Unauthorized: (401, "unauthorized"),
    Forbidden: (403, "forbidden"),
    Conflict: (409, "conflict"),
    UnknownImage: (409, UNKNOWN_IMAGE),
    TooLarge: (413, "too_large"),
    UnsupportedMediaType: (415, "invalid_request"),
}
"""Status and `type` of the answer to each error. A class that is not listed is answered like its
base."""


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """The HTTP answer to an error."""

    status: int
    kind: str
    message: str
    field: str | None = None
    retry_after_s: float | None = None

    @property
    def body(self) -> bytes:
        """The JSON that every 4xx and 5xx carries."""
        error = {"message": self.message, "field": self.field, "type": self.kind}
        # SGLang's clients read `success` and `message`.
        return orjson.dumps({"success": False, "message": self.message, "error": error})

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(max(1, round(self.retry_after_s)))}


def answer_to(error: ServingError) -> ErrorAnswer:
    """Return the answer that `ANSWERS` gives for an error."""
    status, kind = next(ANSWERS[base] for base in type(error).__mro__ if base in ANSWERS)
    if isinstance(error, Refused):
        status = error.status
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else None

    return ErrorAnswer(status, kind, error.message, error.field, retry_after_s)
