"""Read images in the forms that rows, tools and messages give them.

Imports Pillow only when an image is opened: runs without images need none of it.
"""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentloop.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_KEYS = ("image", "image_url")
"""Keys of a content part that hold an image."""


def open_image(value: Any) -> Image:
    """Open an image as a row or a tool gives it.

    Args:
        value: a Pillow image, bytes, a dict with `bytes`, `path` or `url`, a path, or a data URL.

    Raises:
        DataError: the value is not one of them, or not an image.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, Image.Image):
        return value
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value.get("url")

    try:
        if isinstance(value, bytes):
            return Image.open(io.BytesIO(value))
        if isinstance(value, str) and value.startswith("data:"):
            return Image.open(io.BytesIO(base64.b64decode(value.partition(",")[2], validate=True)))
        if isinstance(value, str | Path):
            return Image.open(value)
    except (OSError, UnidentifiedImageError, binascii.Error) as exc:
        raise DataError(f"cannot read an image: {exc}", "give PNG or JPEG data, or the path of such a file") from exc

    raise DataError(f"a {type(value).__name__} is not an image", "give bytes, a path, a data URL or a Pillow image")


def image_data(value: Any) -> str:
    """Return an image in base64 for the rollout server: as PNG, or the bytes that were given.

    Raises:
        DataError: as `open_image`.
    """
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return base64.b64encode(value["bytes"]).decode()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, str) and value.startswith("data:"):
        return value.partition(",")[2]

    buffer = io.BytesIO()
    open_image(value).convert("RGB").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
