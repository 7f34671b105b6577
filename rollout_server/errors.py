"""What a client did wrong, as the JSON that every 4xx and 5xx carries: `{"error": {"message", "field", "type"}}`."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from agentloop.wire import GenerateRequest
from rollout_server.api.sglang_fields import drop_without_effect

ModelT = TypeVar("ModelT", bound=BaseModel)


class HttpError(Exception):
    """An answer other than 200."""

    def __init__(
        self, status: int, kind: str, message: str, field: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> bytes:
        return orjson.dumps({"error": {"message": self.message, "field": self.field, "type": self.kind}})


def bad_request(message: str, field: str | None) -> HttpError:
    return HttpError(400, "invalid_request", message, field)


def parse(model: type[ModelT], body: bytes) -> ModelT:
    """Read a request strictly: a number is a number, an unknown field is an error.

    Raises:
        HttpError: 400 that names the first wrong field.
    """
    try:
        return model.model_validate_json(body or b"{}", strict=True)
    except ValidationError as exc:
        error = explain(model, exc)
        if not any(e["type"] == "extra_forbidden" or e["input"] is None for e in exc.errors(include_url=False)):
            raise error from None
    # What SGLang's clients send beyond our own fields is looked at only here: most requests have none of it.
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise error from None  # NaN, for one, is known to pydantic alone
    if not isinstance(request, dict):
        raise error
    if (refused := drop_without_effect(request, generate=model is GenerateRequest)) is not None:
        raise bad_request(f"{refused[0]} is not served: {refused[1]}", refused[0])
    try:
        return model.model_validate_json(orjson.dumps(request), strict=True)
    except ValidationError as exc:
        raise explain(model, exc) from None


def explain(model: type[BaseModel], error: ValidationError) -> HttpError:
    """The first wrong field; an unknown one with the name that was probably meant."""
    # An unknown field explains a missing one next to it, so it comes first.
    details = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")[0]
    path = [str(part) for part in details["loc"]]
    field = ".".join(path) or None
    if details["type"] != "extra_forbidden":
        return bad_request(f"{field or 'body'}: {details['msg']}", field)
    known = list(_model_at(model, path[:-1]).model_fields)
    close = difflib.get_close_matches(path[-1], known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(known)}"
    return bad_request(f"unknown field {field!r}; {hint}", field)


def _model_at(model: type[BaseModel], path: list[str]) -> type[BaseModel]:
    for part in path:
        annotation: Any = model.model_fields[part].annotation
        options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return model
