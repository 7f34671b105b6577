"""What is wrong with a recipe, in words: the errors of pydantic, and values that nothing takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from agentloop.config.keys import fields_of, nearest, section_of
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


def explain(error: Any, known: Sequence[str], model: type[BaseModel]) -> str:
    """Return one line for an error of pydantic. Values of secret keys are not shown."""
    place = [str(part) for part in error["loc"] if part != "[key]"]
    key = clean(".".join(place), LONGEST_SHOWN)
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {nearest(key, known)}"
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
