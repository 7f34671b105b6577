"""The template text cache: fill in contents that a template only copies, instead of rendering them.

Rendering is a fifth of the cost of a turn, and most of the rendered text is a tool result that the
template copies. That it copies is tested, not assumed: the template is tried on contents of every
kind, and a content is filled in only if the template cannot distinguish it from those.

A template can search a content for strings written in the template (`'</think>' in content`),
inspect its ends (`trim`), or test its kind (a number, empty). Contents that contain one of those
strings, have white space at an end, or are empty are therefore always rendered. One in `COMPARED`
of the others is also rendered, for comparison.
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
"""Contents of every kind, on which a template is tried."""

SIGHTINGS = 3
"""A shape is tried at this sighting. Shapes with an id that a model made up are seen only once."""

MOST_SHAPES = 1024
"""Largest number of shapes that are remembered."""

COMPARED = 64
"""One in this many filled-in contents is also rendered, and compared."""


class TemplateTextCache:
    """A template's text around contents that it only copies, by the shape of the message.

    Args:
        strings: every string that the template could search for in a content.
    """

    def __init__(self, strings: frozenset[str]) -> None:
        found = sorted((text for text in strings if text.strip()), key=len, reverse=True)
        self._strings = re.compile("|".join(map(re.escape, found)) or r"(?!)")
        self._around: dict[Hashable, tuple[str, str] | None] = {}
        self._seen: dict[Hashable, int] = {}
        self._filled = 0

    def fill(self, shape: Hashable, message: Message, render: Callable[[Message], str]) -> str | None:
        """Return the text that `render` would return; None if the message has to be rendered.

        Args:
            shape: everything that the rendering depends on, except the message's content.
            message: its content is a string.
            render: renders the message in its context.
        """
        content = message["content"]
        assert isinstance(content, str)

        around = self._around.get(shape)
        if around is None and shape not in self._around and self._is_due(shape):
            around = self._around[shape] = self._find(message, render)

        # Contents that the template could distinguish from the probes are rendered.
        if around is None or not content or content != content.strip() or self._strings.search(content):
            return None

        text = f"{around[0]}{content}{around[1]}"
        self._filled += 1
        if self._filled % COMPARED == 0 and text != (rendered := render(message)):
            warnings.warn(
                f"the chat template looks into contents in an unexpected way: it renders {rendered!r}, not {text!r}; "
                "such contents are no longer cached",
                stacklevel=2,
            )
            self._around[shape] = None
            return rendered
        return text

    def before(self, shape: Hashable) -> str:
        """Return the text before the content of a shape that is filled in; else an empty string."""
        around = self._around.get(shape)
        return around[0] if around else ""

    def _is_due(self, shape: Hashable) -> bool:
        """Count a sighting of the shape; return whether the template should be tried on it now."""
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
        """Return the text before and after the content; None if it is not only copied."""
        try:
            before, marker, behind = render(_with(message, MARKER)).partition(MARKER)
            if not marker or MARKER in behind:
                return None
            copies = all(render(_with(message, probe)) == f"{before}{probe}{behind}" for probe in PROBES)
        except ModelError:  # the template refuses some contents
            return None
        return (before, behind) if copies else None


def _with(message: Message, content: str) -> Message:
    changed: Any = {**message, "content": content}
    return changed  # type: ignore[no-any-return]  # a TypedDict cannot be rebuilt from `**`
