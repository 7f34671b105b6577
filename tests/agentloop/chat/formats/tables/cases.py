"""`Case`: a turn as a model writes it, and what must be read from it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from agentloop.chat.sampled import SampledText

Call = tuple[str, dict[str, Any]]

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer"},
                    "s": {"type": "string"},
                    "b": {"type": "boolean"},
                    "l": {"type": "array"},
                    "o": {"type": "object"},
                    "n": {"type": ["number", "null"]},
                },
            },
        },
    }
]
"""The tool `f` of all cases: an argument of each type. `x` has no schema."""


@dataclass(frozen=True)
class Case:
    """A turn and its reading.

    Attributes:
        title: what is special about it.
        text: the turn; every control token of the format in it was sampled as one.
        calls: the names and arguments that must be read.
        said: the text around the calls.
        faults: a part of the reason of each malformed call.
        ids: the ids of the calls, if the model wrote some.
        thought: the reasoning.
    """

    title: str
    text: str
    calls: tuple[Call, ...] = ()
    said: str = ""
    faults: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    thought: str | None = None


def marked(text: str, controls: Iterable[str]) -> SampledText:
    """Return a turn in which all these control tokens were sampled."""
    known = frozenset(controls)
    longest_first = sorted(known, key=len, reverse=True)
    found = re.finditer("|".join(map(re.escape, longest_first)), text) if known else ()
    return SampledText(text, {match.start(): match.group() for match in found}, known)
