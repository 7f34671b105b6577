"""Requests with places for arguments, and paths into answers.

`{name}` is the place of an argument; `{{` and `}}` are braces. A text that is a place and nothing
else takes the argument with its JSON type, and is left out with its key if the argument is not
given. Within a longer text an argument is written as text. Values are data everywhere: in a URL
they are quoted, so none can change the host, the path or another parameter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

import httpx

_PLACE = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}")
_WHOLE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


class NotGiven(Exception):
    """A place has no argument."""


class Unusable(Exception):
    """An argument cannot stand in its place; the text says why, for the model."""


def places(template: Any) -> Iterator[str]:
    """Yield the names of a template's places."""
    if isinstance(template, str):
        yield from (match[1] for match in _PLACE.finditer(template) if match[1])
    elif isinstance(template, Mapping):
        for item in template.values():
            yield from places(item)
    elif isinstance(template, list):
        for item in template:
            yield from places(item)


def fill(template: Any, values: Mapping[str, Any]) -> Any:
    """Return JSON data with the arguments in their places.

    Raises:
        NotGiven: the whole template is the place of an argument that is not given.
    """
    if isinstance(template, str):
        whole = _WHOLE.fullmatch(template)
        if whole is None:
            return _filled(template, values, as_text)
        if whole[1] not in values:
            raise NotGiven
        return values[whole[1]]
    if isinstance(template, Mapping):
        return {key: item for key, each in template.items() if (item := _item(each, values)) is not _MISSING}
    if isinstance(template, list):
        return [item for each in template if (item := _item(each, values)) is not _MISSING]
    return template


def fill_url(template: str, values: Mapping[str, Any], query: Mapping[str, Any] | None = None) -> httpx.URL:
    """Return a URL with the arguments in their places, quoted, and with the filled `query`.

    Raises:
        Unusable: an argument is empty, `.` or `..` as a part of the path, or the URL is too long.
    """

    def quoted(value: Any) -> str:
        text = as_text(value)
        if text in ("", ".", ".."):
            raise Unusable(f"{text!r} cannot be looked up")
        return quote(text.encode("utf-8", "replace"), safe="")

    pairs = [
        (key, as_text(each))
        for key, value in fill(query or {}, values).items()
        for each in (value if isinstance(value, list) else [value])
    ]
    given = "&".join(f"{_word(key)}={_word(value)}" for key, value in pairs)
    filled = _filled(template, values, quoted)
    try:
        url = httpx.URL(filled)
        before = url.query.decode()
        return url.copy_with(query="&".join(part for part in (before, given) if part).encode() or None)
    except httpx.InvalidURL as exc:  # all else that it refuses is quoted
        raise Unusable(f"the arguments are too long for a URL: {len(filled) + len(given):,} characters") from exc


def follow(path: str, answer: Any) -> Any:
    """Return what a path names in an answer: `data.items.0.text`; `*` is every item of a list.

    Raises:
        KeyError: there is no such thing; names the part.
    """
    found = answer
    parts = [part for part in path.split(".") if part]
    for number, part in enumerate(parts):
        if part == "*":
            if not isinstance(found, list):
                raise KeyError(part)
            return [follow(".".join(parts[number + 1 :]), item) for item in found]
        if isinstance(found, dict) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.lstrip("-").isdecimal() and -len(found) <= int(part) < len(found):
            found = found[int(part)]
        else:
            raise KeyError(part)
    return found


def as_text(value: Any) -> str:
    """Return an argument as text: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def encodable(value: Any) -> Any:
    """Replace halves of surrogate pairs, which a model may write and no message can hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {encodable(key): encodable(item) for key, item in value.items()}
    return [encodable(item) for item in value] if isinstance(value, list) else value


_MISSING = object()


def _item(template: Any, values: Mapping[str, Any]) -> Any:
    try:
        return fill(template, values)
    except NotGiven:
        return _MISSING


def _filled(template: str, values: Mapping[str, Any], write: Any) -> str:
    def one(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        return str(write(values.get(match[1], "")))

    return _PLACE.sub(one, template)


def _word(text: str) -> str:
    return quote(text.encode("utf-8", "replace"), safe="")
