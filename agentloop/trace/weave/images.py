"""`Images`: the images of conversations, opened once for all the calls that show them."""

from __future__ import annotations

import base64
import io
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from agentloop.errors import DataError
from agentloop.images import image_data

if TYPE_CHECKING:
    from PIL.Image import Image

KEPT = 256
"""Images that stay open: those of the groups that are sent at one time."""


class Images:
    """Opens images in any form that messages hold: those of a trace are `{"sha256", "path"}`."""

    def __init__(self) -> None:
        self._known: OrderedDict[Any, tuple[Any, Image | None]] = OrderedDict()

    def image(self, value: Any) -> Image | None:
        """Return an image; the same object for the same value. None: it cannot be opened."""
        stored = isinstance(value, dict) and "sha256" in value
        name = (value["sha256"], value.get("path")) if stored else id(value)
        if name not in self._known:
            # The value is kept so that its id is not given to another.
            self._known[name] = (value, _open(value))
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return self._known[name][1]


def _open(value: Any) -> Image | None:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        return None
    try:
        image = Image.open(io.BytesIO(base64.b64decode(image_data(value))))
        image.load()
    except (DataError, OSError, SyntaxError, UnidentifiedImageError, ValueError, Image.DecompressionBombError):
        return None
    return image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I") else image.convert("RGB")
