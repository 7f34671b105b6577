"""Fields of weave's requests, and values as weave writes them: times, digests, JSON columns."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from agentloop.files import json_line
from agentloop.web.refusals import Refusal

DEEPEST = 254
"""Levels of a value: those that orjson writes."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_FIRST = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND
_LAST = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND


def text(body: Mapping[str, Any], key: str) -> str:
    """Return a required text.

    Raises:
        Refusal: it is missing, empty or something else.
    """
    value = body.get(key)
    if not isinstance(value, str) or not value:
        raise Refusal(422, f"{key} is missing, or not a text")
    return value


def optional_text(body: Mapping[str, Any], key: str) -> str | None:
    """Return a text that may be missing."""
    value = body.get(key)
    if value is not None and not isinstance(value, str):
        raise Refusal(422, f"{key} must be a text, not {type(value).__name__}")
    return value


def integer(body: Mapping[str, Any], key: str, default: int | None = None) -> int | None:
    """Return an integer that may be missing; it is not negative."""
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise Refusal(422, f"{key} must be an integer from 0")
    return value


def mapping(body: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a required object."""
    value = body.get(key)
    if not isinstance(value, dict):
        raise Refusal(422, f"{key} must be an object")
    return value


def listed(body: Mapping[str, Any], key: str) -> list[Any]:
    """Return a required list."""
    value = body.get(key)
    if not isinstance(value, list):
        raise Refusal(422, f"{key} must be a list")
    return value


def texts(body: Mapping[str, Any], key: str) -> list[str] | None:
    """Return a list of texts that may be missing."""
    value = body.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise Refusal(422, f"{key} must be a list of texts")
    return value


def time_of(value: object, key: str) -> int:
    """Return an ISO 8601 time as microseconds since 1970; one without an offset is UTC."""
    if not isinstance(value, str):
        raise Refusal(422, f"{key} must be a time in ISO 8601")
    try:
        found = datetime.fromisoformat(value)
    except ValueError as exc:
        raise Refusal(422, f"{key} is not a time in ISO 8601: {value[:60]!r}") from exc
    microseconds = ((found if found.tzinfo else found.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND
    if not _FIRST <= microseconds <= _LAST:
        raise Refusal(422, f"{key} must lie in the years 1 to 9999 in UTC, not {value[:60]!r}")
    return microseconds


def iso(microseconds: int | None) -> str | None:
    """Return a time as ISO 8601 in UTC."""
    if microseconds is None:
        return None
    inside = min(max(microseconds, _FIRST), _LAST)  # earlier versions stored times outside
    return (_EPOCH + timedelta(microseconds=inside)).isoformat().replace("+00:00", "Z")


def now() -> int:
    """Return the time, in microseconds since 1970."""
    return time.time_ns() // 1000


def dump(value: object) -> str:
    """Return a value as the JSON text of a column.

    Raises:
        Refusal: it is nested too deeply.
    """
    try:
        return orjson.dumps(value).decode()
    except TypeError as exc:  # an integer of more than 64 bits, or more levels than orjson writes
        if _is_deep(value):
            raise Refusal(422, f"a value is nested deeper than {DEEPEST} levels") from exc
    return json_line(value).decode().rstrip("\n")


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        if not inner:
            return False
        level = inner
    return True


def raw(column: str | None, default: Any = None) -> Any:
    """Return the JSON text of a column so that an answer holds it without parsing it."""
    return default if column is None else orjson.Fragment(column)


def written(value: object) -> orjson.Fragment:
    """Return a value so that orjson writes it whatever it holds, integers of any size included."""
    return orjson.Fragment(json_line(value).rstrip())


def digest_of(content: bytes) -> str:
    """Return weave's digest of bytes: SHA-256 in URL-safe base64 of letters and digits."""
    encoded = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
    return encoded.replace("-", "X").replace("_", "Y").rstrip("=")


def digest_of_value(value: object) -> str:
    """Return weave's digest of a JSON value, which does not depend on the order of keys."""
    return digest_of(json.dumps(value, sort_keys=True).encode())


def digest_of_table(row_digests: Iterable[str]) -> str:
    """Return weave's digest of a table."""
    return hashlib.sha256("".join(row_digests).encode()).hexdigest()


def checked(digest: str, given: Mapping[str, Any]) -> str:
    """Return a digest.

    Raises:
        Refusal: the client expects another; it then sends again without an expectation.
    """
    expected = optional_text(given, "expected_digest")
    if expected is not None and expected != digest:
        raise Refusal(409, f"the digest is {digest}, not {expected} as expected_digest says")
    return digest
