"""What is wrong with a recipe, in words: the errors of pydantic, and values that nothing takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from agentloop.config.keys import fields_of, known_keys, nearest, section_of
from agentloop.text import HIDDEN, SECRET_KEY, clean, did_you_mean, hide_secrets

LONGEST_SHOWN = 120
"""Characters of a wrong value that a message shows."""

LARGEST_INT = 2**63 - 1

KINDS = {
    "model_type": "has to be a section of keys",
    "model_attributes_type": "has to be a section of keys",
    "dict_type": "has to be a section of keys",
    "list_type": "has to be a list, e.g. [a, b]",
    "bool_type": "has to be true or false",
    "bool_parsing": "has to be true or false",
    "string_type": "has to be text (quote it)",
    "path_type": "has to be a path",
    "invalid_key": "has a key that is not text (quote it)",
}
"""Words for types of errors whose own text is about Python."""


def describe_errors(exc: ValidationError, model: type[BaseModel], source: str, overrides: Mapping[str, str]) -> str:
    """Return the text of an error of pydantic: what the wrong values are from, and a line for each.

    Args:
        source: name of the data, such as its file.
        overrides: as `origin_of` takes them.
    """
    known = list(known_keys(model))
    lines: dict[str, str] = {}
    for error in exc.errors(include_url=False):
        place = [str(part) for part in error["loc"]]
        if error["type"] == "missing" and len(place) > 1:  # an override may have made the section
            place.pop()
        lines.setdefault(explain(error, known, model), origin_of(".".join(place), source, overrides))

    count = f"has {len(lines)} errors" if len(lines) > 1 else "has an error"
    origins = list(dict.fromkeys(lines.values()))
    if len(origins) == 1:
        return f"{origins[0]} {count}:\n" + "\n".join(f"  - {line}" for line in lines)
    given = list(overrides.values())
    shown = [f"{line}, in {origin}" if origin in given else line for line, origin in lines.items()]
    head = (
        f"overrides have {len(lines)} errors" if set(origins) <= set(given) else f"{source} with its overrides {count}"
    )
    return f"{head}:\n" + "\n".join(f"  - {line}" for line in shown)


def origin_of(place: str, source: str, overrides: Mapping[str, str]) -> str:
    """Return what a wrong value at a dotted key is from: an override, or `source`; both, if the key
    is a section of which overrides have changed a part.

    Args:
        overrides: each override as messages name it, by its key, in the order in which they apply.
    """
    for key, shown in reversed(list(overrides.items())):
        if f"{place}.".startswith(f"{key}."):
            return shown
    part = any(not place or key.startswith(f"{place}.") for key in overrides)
    return f"{source} with its overrides" if part else source


def explain(error: Any, known: Sequence[str], model: type[BaseModel]) -> str:
    """Return one line for an error of pydantic. Values of secret keys are not shown."""
    place = [str(part) for part in error["loc"] if part != "[key]"]
    key = clean(".".join(place), LONGEST_SHOWN)
    if error["type"] == "extra_forbidden":
        fix = nearest(key, known, "")
        return f"unknown key {key!r}{fix and f'; {fix}'}"
    if error["type"] == "missing":
        return f"key {key!r} is missing"

    message = KINDS.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_pattern_mismatch":
        message = f"does not fit ({_description(model, place) or error['ctx']['pattern']})"
    return f"{key}: {message}{_given(place, error['input'])}{_meant(error)}" if key else message


def _meant(error: Any) -> str:
    """Return which of a key's choices is meant by a wrong one; empty if none is near."""
    if error["type"] != "literal_error" or not isinstance(error["input"], str):
        return ""
    found = did_you_mean(error["input"], re.findall(r"'([^']*)'", error["ctx"]["expected"]), "")
    return found and f"; {found}"


def _given(place: Sequence[str], value: Any) -> str:
    if not place or isinstance(value, dict | BaseModel):
        return ""
    if any(SECRET_KEY.search(part) for part in place):
        return f" (given: {HIDDEN})"
    if isinstance(value, str) and "://" in value and ("?" in value or "@" in value):
        return ""  # users and queries of addresses are secrets often enough
    return f" (given: {clean(repr(hide_secrets(value)), LONGEST_SHOWN)})"


def _description(model: type[BaseModel], place: Sequence[str]) -> str | None:
    """Return the documentation of a key."""
    section: type[BaseModel] | None = model
    info = None
    for part in place:
        info = fields_of(section).get(part) if section is not None else None
        if info is not None:
            section, _ = section_of(info.annotation)
    return info.description if info is not None else None


def value_fault(value: Any, place: str = "") -> str | None:
    """Return what is wrong with a value that no key takes, with its key; None: nothing.

    Those are a NUL or a broken character in a text, and an integer beyond 64 bits.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            here = f"{place}.{key}".lstrip(".")
            fault = value_fault(str(key), f"a key of {place or 'the file'}") or value_fault(item, here)
            if fault is not None:
                return fault
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            fault = value_fault(item, f"{place}.{index}")
            if fault is not None:
                return fault
    elif isinstance(value, str):
        if "\0" in value:
            return f"{clean(place)} has a NUL character"
        if any(0xD800 <= ord(character) < 0xE000 for character in value):
            return f"{clean(place)} is not valid UTF-8"
    elif isinstance(value, int) and not -LARGEST_INT - 1 <= value <= LARGEST_INT:
        return f"{clean(place)} is an integer of more than 64 bits"
    return None
