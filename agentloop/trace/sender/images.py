"""Images of conversations on their way to a sender process: each goes there once, by its key.

A message holds `{"_image": key}` in the place of an image.
"""

from __future__ import annotations

import base64
import io
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from agentloop.errors import DataError
from agentloop.images import image_data

if TYPE_CHECKING:
    from PIL.Image import Image

KEPT = 256
"""Images that either side remembers: those of the groups that are sent at one time."""

MARK = "_image"


class SentImages:
    """What the process has: the images of a step's messages, which the samples of a group share."""

    def __init__(self) -> None:
        self._known: OrderedDict[Any, tuple[Any, str | None]] = OrderedDict()
        self._next = 0
        self.new: dict[str, str] = {}  # key -> base64 or a path: not sent yet

    def reference(self, value: Any) -> dict[str, str] | None:
        """Return what a message holds for an image; None if it cannot be read."""
        name = value.get("sha256") or id(value) if isinstance(value, dict) else id(value)
        if name not in self._known:
            # The value is kept so that its id is not given to another.
            self._known[name] = (value, self._add(value))
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        key = self._known[name][1]
        return None if key is None else {MARK: key}

    def forget(self) -> None:
        """Send everything again: the process is another."""
        self._known.clear()
        self.new.clear()

    def _add(self, value: Any) -> str | None:
        try:
            data = image_data(value)
        except (DataError, ImportError, OSError, ValueError):
            return None
        self._next += 1
        self.new[str(self._next)] = data
        return str(self._next)


class ReceivedImages:
    """The process's side: images by key, opened once."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Image | None] = OrderedDict()

    def add(self, new: Mapping[str, str]) -> None:
        """Open images that were sent."""
        for key, data in new.items():
            self._known[key] = _open(data)
        # More than the sender believes, and all of this request's.
        while len(self._known) > max(2 * KEPT, len(new)):
            self._known.popitem(last=False)

    def image(self, value: Any) -> Image | None:
        """Return the image that a message refers to; None if it cannot be opened."""
        return self._known.get(str(value.get(MARK))) if isinstance(value, dict) else None


def _open(data: str) -> Image | None:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        image.load()
    except (OSError, SyntaxError, UnidentifiedImageError, ValueError, Image.DecompressionBombError):
        return None
    return image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I") else image.convert("RGB")
