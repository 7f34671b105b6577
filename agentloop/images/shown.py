"""Which images messages show, and where a row has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from agentloop.images.opening import IMAGE_KEYS


def images_of(messages: Sequence[Mapping[str, object]]) -> Iterator[Any]:
    """Yield the images in messages, in the order in which a template writes them."""
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            for part in content:
                if (key := image_key(part)) is not None:
                    yield part[key]


def row_place(number: int | None, messages: Sequence[Mapping[str, object]], images: Sequence[Any], column: str) -> str:
    """Return where a row has an image of its messages: `column 'images', image 2`.

    Args:
        number: its place among the images of the messages, from 1; None: unknown.
        images: those of the row's column `images`.
        column: that of the messages.
    """
    if number is None:
        return f"column {column!r}"
    image = next(islice(images_of(messages), number - 1, None), None)
    position = next((i for i, one in enumerate(images, 1) if one is image), None)
    return f"column {column!r}, image {number}" if position is None else f"column 'images', image {position}"


def image_key(part: Any) -> str | None:
    """Return the key of a content part under which its image is; agents may also give texts as
    parts."""
    if not isinstance(part, dict):
        return None
    return next((key for key in IMAGE_KEYS if part.get(key) is not None), None)
