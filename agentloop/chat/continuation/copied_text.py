"""Contents that a template only copies: its text around them is remembered, and not rendered again.

Rendering is a fifth of what a turn costs, and most of what is rendered is a tool's result that the template writes as
it is, between words of its own. That it does is found, not assumed: the template is tried on contents of every kind,
and a content is filled in only when nothing that the template knows could tell it from those. A template can look into
a content with the strings that are written in it (`'</think>' in content`), at its ends (`trim`), or at its kind
(numbers, nothing at all): contents with one of those strings, with white space at an end, or empty are always rendered.
One in so many of the others is rendered too, and compared.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Hashable
from typing import Any

from agentloop.errors import ModelError
from agentloop.types import Message

MARKER = "PROBE-SLOT"
PROBES = (
    "x",
    "-",
    "0",
    "-12.5",
    "1e3",
    "true",
    "None",
    "null",
    "a b",
    "Two words.\n\nA second  line\twith more,\r\nand a third",
    '{"a": [1, "b"], "c": null}',
    "[1, 2]",
    "(x)",
    "<b>bold & 'quoted' \"too\"</b> `code` $x$ \\n {{ x }} {% if %} %s {0}",
    "É 漢字 🙂 ß \u200b",
    "https://example.org/a?b=c#d",
    "```python\nprint(1)\n```",
    "a, b; c: d | e / f",
    "long " * 2000 + "end",
)
SIGHTINGS = 3
"""A shape is tried when it has been seen so often; those with an id that a model made up are seen once."""

MOST_SHAPES = 1024
COMPARED = 64
"""One in so many is rendered, and compared."""


class TemplateTextCache:
    """The text of a template around contents that it only copies, by the shape of what is rendered.

    Args:
        strings: every string that the template could look for in a content.
    """

    def __init__(self, strings: frozenset[str]) -> None:
        found = sorted((text for text in strings if text.strip()), key=len, reverse=True)
        self._strings = re.compile("|".join(map(re.escape, found)) or r"(?!)")
        self._around: dict[Hashable, tuple[str, str] | None] = {}
        self._seen: dict[Hashable, int] = {}
        self._filled = 0

    def fill(self, shape: Hashable, message: Message, render: Callable[[Message], str]) -> str | None:
        """What `render` makes of the message, without rendering it; None: it has to be rendered.

        Args:
            shape: everything that the rendering depends on but for the message's content.
        """
        content = message["content"]
        assert isinstance(content, str)
        around = self._around.get(shape)
        if around is None and shape not in self._around and self._is_due(shape):
            around = self._around[shape] = self._find(message, render)
        if around is None or not content or content != content.strip() or self._strings.search(content):
            return None
        text = f"{around[0]}{content}{around[1]}"
        self._filled += 1
        if self._filled % COMPARED == 0 and text != (rendered := render(message)):
            warnings.warn(
                f"the chat template looks into contents in a way that was not foreseen: {rendered!r} is not {text!r}",
                stacklevel=2,
            )
            self._around[shape] = None
            return rendered
        return text

    def before(self, shape: Hashable) -> str:
        """The text before the content, of a shape that is filled in; else nothing."""
        around = self._around.get(shape)
        return around[0] if around else ""

    def _is_due(self, shape: Hashable) -> bool:
        sightings = self._seen.pop(shape, 0) + 1
        if sightings >= SIGHTINGS:
            if len(self._around) >= MOST_SHAPES:
                self._around.clear()
            return True
        if len(self._seen) >= MOST_SHAPES:
            self._seen.clear()
        self._seen[shape] = sightings
        return False

    def _find(self, message: Message, render: Callable[[Message], str]) -> tuple[str, str] | None:
        """The text before and behind the content; None: the template does not only copy it."""
        try:
            before, marker, behind = render(_with(message, MARKER)).partition(MARKER)
            if not marker or MARKER in behind:
                return None
            copies = all(render(_with(message, probe)) == f"{before}{probe}{behind}" for probe in PROBES)
        except ModelError:  # it refuses some contents
            return None
        return (before, behind) if copies else None


def _with(message: Message, content: str) -> Message:
    changed: Any = {**message, "content": content}
    return changed  # type: ignore[no-any-return]
