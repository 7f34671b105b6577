"""Read requests strictly; errors are one line that names the field."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from agentloop.config.keys import section_of
from agentloop.wire import GenerateRequest
from rollout_server.api.batch import expand, is_batch
from rollout_server.api.sglang_fields import drop_without_effect
from rollout_server.errors import RequestError

ModelT = TypeVar("ModelT", bound=BaseModel)


def parse(model: type[ModelT], body: bytes) -> ModelT:
    """Validate a request's JSON: a number must be a number, an unknown field is an error.

    Raises:
        RequestError: names the first wrong field.
    """
    try:
        return model.model_validate_json(body or b"{}", strict=True)
    except ValidationError as exc:
        error = explain(model, exc)
        if not _may_be_sglangs(exc):
            raise error from None

    request = _object(body)
    if request is None:
        raise error
    return _parse_object(model, request)


def parse_generate(body: bytes) -> GenerateRequest | list[GenerateRequest]:
    """Validate the JSON of `/generate`; return a list if it asks for a list of answers.

    Raises:
        RequestError: names the first wrong field.
    """
    try:
        return GenerateRequest.model_validate_json(body or b"{}", strict=True)
    except ValidationError as exc:
        error = explain(GenerateRequest, exc)

    # Off the fast path: few requests are batches, or have fields that only SGLang's clients send.
    request = _object(body)
    if request is None:
        raise error
    if not is_batch(request):
        if isinstance(sampling := request.get("sampling_params"), dict):
            sampling.pop("n", None)  # 1 or null
        return _parse_object(GenerateRequest, request)

    requests = []
    for number, one in enumerate(expand(request)):
        try:
            requests.append(_parse_object(GenerateRequest, one))
        except RequestError as exc:
            raise RequestError(f"answer {number} of the batch: {exc.message}", exc.field) from None
    return requests


def _may_be_sglangs(error: ValidationError) -> bool:
    """Return whether a request may be right without the fields that only SGLang's clients send."""
    return any(e["type"] == "extra_forbidden" or e["input"] is None for e in error.errors(include_url=False))


def _object(body: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a body, or None."""
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None  # pydantic accepts NaN, orjson does not
    return request if isinstance(request, dict) else None


def _parse_object(model: type[ModelT], request: dict[str, Any]) -> ModelT:
    """Validate a request without the fields that have no effect here."""
    generate = model is GenerateRequest
    if (refused := drop_without_effect(request, generate=generate)) is not None:
        raise RequestError(f"{refused[0]} is not supported: {refused[1]}", refused[0])
    try:
        return model.model_validate_json(orjson.dumps(request), strict=True)
    except ValidationError as exc:
        raise explain(model, exc) from None


def explain(model: type[BaseModel], error: ValidationError) -> RequestError:
    """Return an error for the first wrong field; for an unknown field it names the nearest known
    one."""
    # Report an unknown field before a missing one: it is usually the misspelled name of it.
    details = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")[0]
    path = [str(part) for part in details["loc"]]
    field = ".".join(path) or None
    if details["type"] != "extra_forbidden":
        return RequestError(f"{field or 'body'}: {details['msg'].removeprefix('Value error, ')}", field)

    known = list(_model_at(model, path[:-1]).model_fields)
    close = difflib.get_close_matches(path[-1], known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(known)}"
    return RequestError(f"unknown field {field!r}; {hint}", field)


def _model_at(model: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """Return the model of the nested message at `path`."""
    for part in path:
        nested, _ = section_of(model.model_fields[part].annotation)
        assert nested is not None
        model = nested
    return model
