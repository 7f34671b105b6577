"""`Shape`: how a format writes calls, part by part; and turns, schemas and random calls for tests.

A writer in a shape is independent of the product: it builds a turn from pieces of text. Those
pieces that are listed as control tokens were sampled as such; all others are ordinary text.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from agentloop.chat.formats import FORMATS
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn

Calls = list[tuple[str, dict[str, Any]]]
"""Names and arguments."""

Sources = list[tuple[str, list[tuple[str, str]]]]
"""Names and arguments, each value as the format's source text, right or wrong."""

Pieces = list[str]
"""Parts of a turn; a piece that is a control token was sampled as one."""


class Plain(str):
    """A piece of ordinary text, even if it spells a control token."""


FOREIGN = "<|foreign|>"
"""A control token that belongs to no grammar."""


@dataclass(frozen=True)
class Shape:
    """How a format writes calls.

    Attributes:
        format: the name of the format.
        variant: which of its forms this is, if it has several.
        write: returns the pieces of a turn that consists of these calls.
        controls: the tags that are control tokens of the models that write this format.
        closing: how many pieces at the end of `write` close the call; 0 if the body ends it.
        language: how a value is written: `json`, `python`, or as bare `text` between tags.
        ends_itself: the body shows its end, so that a call without its closing tag is complete at
            the end of a turn.
        announced: a tag precedes the calls; otherwise they are calls only as the whole turn.
        several: a turn may contain several calls.
        given: returns the pieces of a call whose arguments as a whole are this source text; None:
            the format writes them one by one.
        opening: the tag that is allowed twice in front of a call; empty: there is none.
        text_after: text may follow the calls.
        listed: the calls of a turn are in one list, which ends where it cannot be read.
        said: how text is written before the calls.
        bounds: how the pieces between two calls begin; without all of them two calls read as one.
        quoting: strings may spell the tags where these are no control tokens, escaped or quoted.
    """

    format: str
    write: Callable[[Sources], Pieces]
    controls: frozenset[str]
    language: Literal["json", "python", "text"] = "json"
    variant: str = ""
    closing: int = 1
    ends_itself: bool = True
    announced: bool = True
    several: bool = True
    given: Callable[[str, str], Pieces] | None = None
    opening: str = ""
    text_after: bool = True
    listed: bool = False
    said: Callable[[str], Pieces] = lambda text: [text]
    bounds: tuple[str, ...] = ()
    quoting: bool = True

    def __str__(self) -> str:
        return f"{self.format}-{self.variant}" if self.variant else self.format

    def value(self, value: Any) -> str:
        """Return a value as source text."""
        if self.language == "python":
            return repr(value)
        if self.language == "text" and isinstance(value, str):
            return value
        return json.dumps(value, ensure_ascii=False)

    def sources(self, calls: Calls) -> Sources:
        """Return calls with their values as source text."""
        return [(name, [(key, self.value(value)) for key, value in given.items()]) for name, given in calls]

    def pieces(self, calls: Calls) -> Pieces:
        """Return the pieces of a turn that consists of these calls."""
        return self.write(self.sources(calls))

    def turn(self, pieces: Pieces) -> SampledText:
        """Return the turn as it is sampled with the tokenizer of these models."""
        return sampled(pieces, {*self.controls, *reasoning_tags(self.format), FOREIGN})

    def parse(self, pieces: Pieces, tools: list[dict[str, Any]] | None) -> ParsedTurn:
        """Read a turn."""
        return FORMATS[self.format].parse(self.turn(pieces), tools)


def words(text: str) -> frozenset[str]:
    """Return the words of a text, for instance tags."""
    return frozenset(re.findall(r"\S+", text))


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def json_object(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a JSON object of keys and source texts, which need not be valid."""
    return "{" + ", ".join(f"{dumped(key)}: {source}" for key, source in pairs) + "}"


def joined(parts: Iterable[Pieces], *separator: str) -> Pieces:
    """Return parts with pieces between them."""
    return [piece for i, part in enumerate(parts) for piece in (*(separator if i else ()), *part)]


def reasoning_tags(name: str) -> tuple[str, ...]:
    """Return the tags around a format's reasoning."""
    return getattr(FORMATS[name], "reasoning_tags", None) or ()


def sampled(pieces: Iterable[str], known: Iterable[str]) -> SampledText:
    """Return a turn in which those pieces that are `known` were sampled as control tokens."""
    known, text, controls = frozenset(known), "", {}
    for piece in pieces:
        if piece in known and not isinstance(piece, Plain):
            controls[len(text)] = piece
        text += piece
    return SampledText(text, controls, known)


TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def schemas(calls: Calls) -> list[dict[str, Any]]:
    """Return schemas with the types of the calls' arguments; of both calls if they differ."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, given in calls:
        properties = found.setdefault(name, {})
        for key, value in given.items():
            properties.setdefault(key, []).append("null" if value is None else TYPES[type(value)])
    return [
        {
            "type": "function",
            "function": {"name": name, "parameters": {"properties": {k: {"type": v} for k, v in given.items()}}},
        }
        for name, given in found.items()
    ]


def same(parsed: ParsedTurn, calls: Calls) -> bool:
    """Whether these calls were read; compared as text, because True equals 1 in Python."""
    return repr([(call.name, call.arguments) for call in parsed.tool_calls]) == repr(calls)


LETTERS = "abcxyz_019.-"
TRICKY = [
    *"\"'\\\n\t {}[]()=,:;<>&|",
    "漢字",
    "é",
    "🙂",
    "\u2028",
    "True",
    "null",
    "07",
    "```",
    "</x>",
    "\\n",
    "\\u00e9",
]


def random_name(rng: random.Random) -> str:
    return rng.choice("abcxyz_") + "".join(rng.choices(LETTERS, k=rng.randrange(8)))


def random_text(rng: random.Random, tags: Iterable[str] = ()) -> str:
    parts = [*TRICKY, *tags, *"abc"]
    return "".join(rng.choices(parts, k=rng.choice((0, 1, 2, 5, 12))))


def random_value(rng: random.Random, tags: Iterable[str] = (), depth: int = 2) -> Any:
    kind = rng.randrange(8 if depth else 6)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice((0, -1, 7, 2**63 - 1, -(2**63), rng.randrange(10**6)))
    if kind == 2:
        return rng.choice((0.5, -1e300, 1e-7, 5e-324, rng.random()))
    if kind == 6:
        return [random_value(rng, tags, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {random_text(rng, tags): random_value(rng, tags, depth - 1) for _ in range(rng.randrange(4))}
    return random_text(rng, tags)


def random_calls(rng: random.Random, tags: Iterable[str] = (), most: int = 3) -> Calls:
    """Return calls of different tools, whose values spell the tags among other text."""
    names = dict.fromkeys(random_name(rng) for _ in range(rng.randrange(1, most + 1)))
    return [
        (name, {random_name(rng): random_value(rng, tags) for _ in range(rng.choice((0, 1, 1, 2, 4)))})
        for name in names
    ]
