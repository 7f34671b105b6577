"""Read requests strictly; errors are one line that names the field."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from agentloop.config.keys import section_of
from agentloop.wire import GenerateRequest, SamplingParams
from rollout_server.api.batch import answers, expand, is_batch
from rollout_server.api.sglang_fields import drop_without_effect
from rollout_server.errors import RequestError, TooLarge

MAX_KEYS = 1000
"""Most keys of a request and of its `sampling_params`: pydantic collects an error for each."""

MAX_VALUES = 2**21
"""Most values of a body: each costs memory and time, and no other request moves while JSON is
parsed."""

MAX_CONTAINERS = 2**16
"""Most lists and objects of a body. Python's garbage collector looks at each of them again and
again."""

MAX_SHOWN = 100
"""Characters of a client's name for a field that a message shows."""

ModelT = TypeVar("ModelT", bound=BaseModel)


def parse(model: type[ModelT], body: bytes) -> ModelT:
    """Validate a request's JSON: a number must be a number, an unknown field is an error.

    Raises:
        RequestError: names the first wrong field.
    """
    body = _bounded(body or b"{}")
    try:
        return model.model_validate_json(body, strict=True)
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
    body = _bounded(body or b"{}")
    try:
        return GenerateRequest.model_validate_json(body, strict=True)
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

    requests: list[GenerateRequest] = []
    parsed: dict[int, SamplingParams] = {}
    prompts = expand(request)
    for one, rids in prompts:
        try:
            prompt = _parse_prompt({**one, "rid": rids[-1]}, parsed)  # the longest id
        except RequestError as exc:
            raise RequestError(f"answer {len(requests)} of the batch: {exc.message}", exc.field) from None
        requests += answers(prompt, rids)
    return requests


def _parse_prompt(request: dict[str, Any], parsed: dict[int, SamplingParams]) -> GenerateRequest:
    """Validate the request for one prompt of a batch.

    Args:
        parsed: sampling parameters by the `id()` of their JSON, which many prompts share.
    """
    _drop_without_effect(GenerateRequest, request)
    sampling = request.get("sampling_params")
    try:
        if isinstance(sampling, dict):
            if id(sampling) not in parsed:
                alone = orjson.dumps({"input_ids": [0], "sampling_params": sampling})
                parsed[id(sampling)] = GenerateRequest.model_validate_json(alone, strict=True).sampling_params
            request["sampling_params"] = parsed[id(sampling)]
        return GenerateRequest.model_validate(request, strict=True)
    except ValidationError as exc:
        raise explain(GenerateRequest, exc) from None


def _bounded(body: bytes) -> bytes:
    """Return a body that pydantic validates quickly, right or wrong; as it is if its keys are few.

    Raises:
        TooLarge: there are too many values.
        RequestError: there are too many keys, or a wrong entry among many of `logit_bias`.
    """
    if len(body) > MAX_CONTAINERS:
        _check_counts(body)
    if body.count(b":") <= MAX_KEYS:
        return body
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise RequestError(f"body: {exc}") from None
    sampling = request.get("sampling_params") if isinstance(request, dict) else None
    several = sampling if isinstance(sampling, list) else [sampling]
    for field, fields in (("body", request), *(("sampling_params", one) for one in several)):
        if not isinstance(fields, dict):
            continue
        if len(fields) > MAX_KEYS:
            raise RequestError(f"{field} has {len(fields)} keys, of at most {MAX_KEYS}", field)
        bias = fields.get("logit_bias")
        for token, value in bias.items() if isinstance(bias, dict) else ():
            number = token.removeprefix("-")
            if not (number.isascii() and number.isdigit() and len(number) < 20):
                raise RequestError(
                    f"sampling_params.logit_bias: {_shown(token)!r} is not a token id", "sampling_params.logit_bias"
                )
            if type(value) not in (int, float) or not -100 <= value <= 100:
                raise RequestError(
                    f"sampling_params.logit_bias.{token} must be a number from -100 to 100",
                    f"sampling_params.logit_bias.{token}",
                )
    return orjson.dumps(request)  # without keys that are there twice


def _check_counts(body: bytes) -> None:
    """Refuse a body with too many values, by its punctuation."""
    values = body.count(b",") + 1
    if values > MAX_VALUES:
        raise TooLarge(f"the body holds {values} values, of at most {MAX_VALUES}: send several requests")
    containers = body.count(b"[") + body.count(b"{")
    if containers > MAX_CONTAINERS:
        raise TooLarge(
            f"the body holds {containers} lists and objects, of at most {MAX_CONTAINERS}: send several requests"
        )


def _shown(name: str) -> str:
    """Return a client's name for a field, cut for a message."""
    return name if len(name) <= MAX_SHOWN else name[:MAX_SHOWN] + "..."


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
    _drop_without_effect(model, request)
    try:
        return model.model_validate_json(orjson.dumps(request), strict=True)
    except ValidationError as exc:
        raise explain(model, exc) from None


def _drop_without_effect(model: type[BaseModel], request: dict[str, Any]) -> None:
    generate = model is GenerateRequest
    if (refused := drop_without_effect(request, generate=generate)) is not None:
        raise RequestError(f"{refused[0]} is not supported: {refused[1]}", refused[0])


def explain(model: type[BaseModel], error: ValidationError) -> RequestError:
    """Return an error for the first wrong field; for an unknown field it names the nearest known
    one."""
    # Report an unknown field before a missing one: it is usually the misspelled name of it.
    details = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")[0]
    path = [_shown(str(part)) for part in details["loc"]]
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
