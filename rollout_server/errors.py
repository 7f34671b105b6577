"""What a client did wrong, as the JSON that every 4xx and 5xx carries: `{"error": {"message", "field", "type"}}`."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

ModelT = TypeVar("ModelT", bound=BaseModel)

TEXT_REFUSED = (
    "this server takes token ids and knows no tokenizer: text that is encoded again is not the text that was sampled. "
    "Send `input_ids`."
)

PICKLES_REFUSED = (
    "pickled tensors are not taken, because unpickling runs whatever code the sender likes. Write the tensors to "
    "model.safetensors in a folder in shared memory, under a --weights-root, and send `shm_path` and `weight_version`."
)

REFUSED_FIELDS = {"text": TEXT_REFUSED, "serialized_named_tensors": PICKLES_REFUSED}
"""Fields that SGLang knows and this server does not take, whatever else a request holds."""


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
        raise explain(model, exc) from None


def explain(model: type[BaseModel], error: ValidationError) -> HttpError:
    """The first wrong field; an unknown one with the name that was probably meant."""
    errors = error.errors(include_url=False)
    for one in errors:
        if len(one["loc"]) == 1 and (reason := REFUSED_FIELDS.get(str(one["loc"][0]))) and _is_unknown(one):
            return bad_request(reason, str(one["loc"][0]))
    # An unknown field explains a missing one next to it, so it comes first.
    details = sorted(errors, key=lambda e: not _is_unknown(e))[0]
    path = [str(part) for part in details["loc"]]
    field = ".".join(path) or None
    if not _is_unknown(details):
        return bad_request(f"{field or 'body'}: {details['msg']}", field)
    known = list(_model_at(model, path[:-1]).model_fields)
    close = difflib.get_close_matches(path[-1], known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(known)}"
    return bad_request(f"unknown field {field!r}; {hint}", field)


def _is_unknown(details: Any) -> bool:
    return bool(details["type"] == "extra_forbidden")


def _model_at(model: type[BaseModel], path: list[str]) -> type[BaseModel]:
    for part in path:
        annotation: Any = model.model_fields[part].annotation
        options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        model = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return model
