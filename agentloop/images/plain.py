"""Turn an image into an `ImageFile`, which every reader decodes to the same pixels."""

from __future__ import annotations

import base64
import io
import math
from typing import TYPE_CHECKING, Any

from agentloop.errors import ImageError
from agentloop.images.file import MAX_PIXELS, ImageFile
from agentloop.images.opening import behind, image_name, open_image, source_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

EXIF_ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""Orientations in which width and height are swapped."""

TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""Pillow's operation that sets an image upright, by orientation."""

PLAIN_MODES = ("RGB", "L")
PLAIN_FORMATS = ("PNG", "JPEG")
JPEG_QUALITY = 95


def read_image(value: Any) -> ImageFile:
    """Decode an image completely, and return it as a plain file.

    A rotation of its EXIF data is applied, transparency shows white, of several frames the first is
    taken, and colors become RGB. A file that is plain already is kept, byte for byte.

    Takes up to seconds for large images: do not call it on the event loop.

    Raises:
        ImageError: see `open_image`; or the file is cut or damaged.
    """
    if isinstance(value, ImageFile):
        return value
    image = open_image(value)
    size = image_size(image)
    try:
        plain = _is_plain(image)
        image.load()
        if plain and size == image.size:
            return ImageFile(_file_of(value, image), *size)
        lossy = image.format in ("JPEG", "MPO")
        shown = _upright_rgb(image)
        if shown.size != size:
            shown = shown.resize(size, _lanczos())
        return encoded(shown, lossy=lossy)
    except ImageError:
        raise
    except Exception as exc:  # decoders raise anything on damaged data
        reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
        fault = f"an image cannot be decoded: {behind(image_name(value))}{reason}"
        raise ImageError(fault, "replace the file: it is cut or damaged") from exc


def image_size(value: Any) -> tuple[int, int]:
    """Return (width, height) of the `ImageFile` that `read_image` makes, from the header alone.

    Raises:
        ImageError: see `open_image`.
    """
    if isinstance(value, ImageFile):
        return value.width, value.height
    image = open_image(value)
    width, height = image.size
    if _orientation(image) in SIDEWAYS:
        width, height = height, width
    if width * height <= MAX_PIXELS:
        return width, height
    scale = math.sqrt(MAX_PIXELS / (width * height))
    return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))


def image_data(value: Any) -> str:
    """Return an image in base64 for the rollout server: the bytes that were given, else a PNG.

    Raises:
        ImageError: as `read_image`; bytes are not looked into.
    """
    data = value.data if isinstance(value, ImageFile) else source_bytes(value)
    return base64.b64encode(read_image(value).data if data is None else data).decode()


def encoded(image: Image, *, lossy: bool = False) -> ImageFile:
    """Encode an RGB image as PNG, or as JPEG if `lossy`."""
    buffer = io.BytesIO()
    if lossy:
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(buffer, "PNG", compress_level=1)
    return ImageFile(buffer.getvalue(), *image.size)


def _is_plain(image: Image) -> bool:
    """Whether every reader decodes the image's file to the same pixels."""
    return (
        image.format in PLAIN_FORMATS
        and image.mode in PLAIN_MODES
        and getattr(image, "n_frames", 1) == 1
        and "transparency" not in image.info
        and _orientation(image) in (None, 1)
    )


def _file_of(value: Any, image: Image) -> bytes:
    data = source_bytes(value)
    if data is not None:
        return data
    name = getattr(image, "filename", "")
    if not name or image is value:  # an object in memory may have been changed since it was opened
        return encoded(image.convert("RGB")).data
    with open(name, "rb") as file:  # noqa: PTH123  # Pillow keeps the name as text
        return file.read()


def _orientation(image: Image) -> Any:
    try:
        return image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # noqa: BLE001  # damaged EXIF data: the picture itself may be whole
        return None


def _upright_rgb(image: Image) -> Image:
    """Return the first frame, turned as its EXIF data says, over white, in RGB."""
    from PIL import Image as images

    turned = _orientation(image)
    # Not by ImageOps.exif_transpose, which fails if the rest of the EXIF data is damaged.
    if (turn := TURNS.get(turned)) is not None:
        image = image.transpose(getattr(images.Transpose, turn))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _gray(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        colors = image.convert("RGBA")
        white = images.new("RGBA", colors.size, (255, 255, 255, 255))
        return images.alpha_composite(white, colors).convert("RGB")
    return image.convert("RGB")


def _gray(image: Image) -> Image:
    """Scale brightness of more than 8 bits to 8: Pillow itself would cut it off at 255."""
    import numpy as np
    from PIL import Image as images

    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    top = 65535.0 if values.max(initial=0.0) > 255.0 else 255.0
    return images.fromarray(np.clip(values * (255.0 / top), 0, 255).round().astype(np.uint8))


def _lanczos() -> Any:
    from PIL.Image import Resampling

    return Resampling.LANCZOS
