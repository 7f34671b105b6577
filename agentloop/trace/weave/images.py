"""Images of conversations as weave shows them: each opened once, however many calls hold it."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from agentloop.errors import DataError
from agentloop.images import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

KEPT = 64
"""Images that stay open: those of the groups that are sent at one time."""


class Images:
    """Images by what the messages hold: the samples of a group share theirs."""

    def __init__(self) -> None:
        self._open: OrderedDict[Any, tuple[Any, Image | None]] = OrderedDict()

    def open(self, value: Any) -> Image | None:
        """Return an image, or None for one that cannot be read."""
        key = value.get("sha256") or id(value) if isinstance(value, dict) else id(value)
        known = self._open.get(key)
        if known is None:
            # The value is kept so that its id is not given to another.
            known = self._open[key] = (value, _read(value))
        self._open.move_to_end(key)
        while len(self._open) > KEPT:
            self._open.popitem(last=False)
        return known[1]


def _read(value: Any) -> Image | None:
    try:
        image = open_image(value)
        image.load()  # a file that is cut off shows it here
    except (DataError, ImportError, OSError, SyntaxError, ValueError):
        return None
    return image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I") else image.convert("RGB")
