"""What is wrong with a row whose images and places for them differ in number."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from agentloop.errors import DataError
from agentloop.text import counted
from agentloop.types import Message, Task

IMAGE_MARK = "<image>"
"""Marks the place of an image of column `images` in a prompt's text."""

OTHER_COLUMNS = frozenset(
    {
        *("prompt", "messages", "images", "agent_name", "reward_model", "extra_info", "data_source", "ability"),
        *("tools", "text", "loss_from"),
    }
)
"""Columns with a meaning of their own, and `images` itself."""

IMAGE_NAME = re.compile(
    r"(?:^|[^a-z])(?:ima?ge?s?|pics?|pictures?|photos?|figures?|diagrams?|screenshots?)(?:[^a-z]|$)", re.IGNORECASE
)
"""Names that people give to columns of images."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
"""First bytes of image files."""

MOST_NAMED = 4
"""Messages with a place that an error names."""


class Place(NamedTuple):
    """A place for an image of column `images`."""

    message: int
    """Number of its message, from 1."""
    role: str
    is_mark: bool
    """Whether it is an `<image>` in a text; else a part `{"type": "image"}`."""


def miscounted(row: Mapping[str, Any], where: str, column: str, images: int, places: Sequence[Place]) -> DataError:
    """Return the error of a row whose numbers of images and places differ.

    If it has no images, a column that looks like it holds them is named as the likely cause.

    Args:
        where: the row, for the message.
        column: that of the messages.
    """
    counts = f"{counted(images, 'image')} and {counted(len(places), 'place')}"
    fault = f"{where} has {counts} in column {column!r} for images of column 'images'"
    roles = {place.message: place.role for place in places}
    if roles:
        shown = [f"message {number} of role {role}" for number, role in roles.items()][:MOST_NAMED]
        fault += f" ({', '.join(shown)}{', ...' if len(roles) > MOST_NAMED else ''})"

    other = image_column(row) if not images else None
    if other is not None:
        fault += f"; column {other!r} seems to hold them"
        return DataError(fault, f"rename column {other!r} to 'images'")
    if images > len(places):
        surplus = _some(images - len(places), images, "image")
        fix = f"write {IMAGE_MARK} in the text where each image belongs, or remove {surplus} from column 'images'"
        return DataError(fault, fix)
    missing = len(places) - images
    places_left = _some(missing, len(places), IMAGE_MARK if any(place.is_mark for place in places) else "image part")
    return DataError(fault, f"remove {places_left}, or add the missing image{'s' * (missing > 1)} to column 'images'")


def _some(count: int, total: int, thing: str) -> str:
    several = thing if thing == IMAGE_MARK or total == 1 else f"{thing}s"
    return f"the {several}" if count == total else f"{'one' if count == 1 else count} of the {several}"


def image_column(row: Mapping[str, Any]) -> str | None:
    """Return the name of a column, other than `images`, that seems to hold images."""
    for name, value in row.items():
        if name not in OTHER_COLUMNS and (_is_image(value) or (_is_named_so(str(name)) and _holds(value))):
            return str(name)
    return None


def _is_named_so(name: str) -> bool:
    return bool(IMAGE_NAME.search(name) or difflib.get_close_matches(name.lower(), ["images"], cutoff=0.75))


def _holds(value: Any) -> bool:
    return isinstance(value, str | bytes | list | dict) and bool(value)


def _is_image(value: Any) -> bool:
    """Whether a value, or the first of a list, looks like an image."""
    if isinstance(value, list):
        return bool(value) and not isinstance(value[0], list) and _is_image(value[0])
    if isinstance(value, dict):
        return any(_is_image(value.get(key)) for key in ("bytes", "path", "url"))
    if isinstance(value, bytes):
        return value.startswith(MAGIC)
    if isinstance(value, str):
        text = value.lower()
        # Brackets and quotes: the column may be JSON text.
        return text.startswith("data:image/") or text.rstrip("\"']} ").endswith(SUFFIXES)
    return type(value).__module__.startswith("PIL.")


class ImageMarks:
    """Finds rows with `<image>` and no images in a split of which other rows have images.

    A model that takes images refuses such rows anyway. This is for all models: in rows without any
    images, the mark is text like any other.
    """

    def __init__(self) -> None:
        self._with_images = False
        self._marked: DataError | None = None

    def check(self, task: Task, where: str) -> None:
        """Take note of a row; `where` names it.

        Raises:
            DataError: there are rows of both kinds; the first with `<image>` alone is named.
        """
        self._with_images |= bool(task.images)
        if self._marked is None and not task.images and (places := marks_of(task.prompt)):
            self._marked = miscounted({}, where, "prompt", 0, places)
        if self._with_images and self._marked is not None:
            raise self._marked


def marks_of(messages: Sequence[Message]) -> list[Place]:
    """Return the places that `<image>` marks in messages to the model; its own are text only."""
    found: list[Place] = []
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant":
            continue
        content = message["content"]
        texts = [content] if isinstance(content, str) else [str(part.get("text") or "") for part in content]
        found += [Place(number, message["role"], True) for text in texts for _ in range(text.count(IMAGE_MARK))]
    return found
