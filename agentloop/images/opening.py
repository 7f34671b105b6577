"""Open an image in any form in which rows, tools and messages give it."""

from __future__ import annotations

import base64
import io
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentloop.errors import ImageError
from agentloop.images.file import ImageFile
from agentloop.text import clean, with_article

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_KEYS = ("image", "image_url")
"""Keys of a content part that hold an image."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Pillow reads more formats, but some of them start other programs."""

MAX_SOURCE_PIXELS = 2**26
"""Largest image that is decoded: 67 megapixels, 200 MB. A file of a few kB can expand to more."""

SCHEME = re.compile(r"(data):|([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
"""Beginning of an address; other text is a path."""

LONGEST_NAME = 200
"""Characters of a path that a message shows: what is not a path may be a whole image in base64."""

FORMS = "give bytes, {bytes, path}, the path of a file, a data URL or a Pillow image"


class RowPath(str):
    """The path of an image that a row gives relative to the folder of its file.

    The text is the path that is opened, `folder / given`.
    """

    given: str
    folder: Path

    def __new__(cls, given: str, folder: Path) -> RowPath:
        path = super().__new__(cls, folder / given)
        path.given, path.folder = given, folder
        return path

    def __reduce__(self) -> tuple[type[RowPath], tuple[str, Path]]:  # for copies and pickles
        return type(self), (self.given, self.folder)


def open_image(value: Any) -> Image:
    """Open an image and read its header; its pixels are decoded when they are used.

    Args:
        value: a Pillow image, an `ImageFile`, bytes, a dict with `bytes`, `path` or `url`, a path,
            a `file://` URL or a data URL.

    Raises:
        ImageError: the value is not one of them, not an image, of an unsupported format, or of more
            than `MAX_SOURCE_PIXELS`.
    """
    from PIL import Image

    source, name = _source(value), image_name(value)
    if isinstance(source, Image.Image):
        image = source
    else:
        if isinstance(source, Path):
            _check_file(source, name, _path_hint(value))
        try:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        except Image.DecompressionBombError:
            raise _too_large("more than 178 million pixels", name) from None
        except Exception as exc:  # a damaged header raises anything, from SyntaxError to struct.error
            fault = f"cannot read an image: {behind(name)}{_reason(exc)}"
            raise ImageError(fault, f"give one of {', '.join(FORMATS)}") from exc

    if image.width * image.height > MAX_SOURCE_PIXELS:
        raise _too_large(f"{image.width} x {image.height} pixels", name)
    if not image.width or not image.height:
        raise ImageError(f"{behind(name)}an image of {image.width} x {image.height} pixels is empty", "remove it")
    return image


def check_form(value: Any) -> None:
    """Check that a value has one of the forms of an image; it is not opened.

    Raises:
        ImageError: it has none of them.
    """
    _source(value)


def image_name(value: Any) -> str:
    """Return the path of an image as messages show it; empty if it has none, as bytes do."""
    if isinstance(value, dict):
        value = value.get("path") or value.get("url")
    if isinstance(value, str) and value.lower().startswith("file://"):
        value = value[len("file://") :]
    if isinstance(value, Path) or (isinstance(value, str) and value and is_path(value)):
        return clean(value, LONGEST_NAME)
    return ""


def behind(name: str) -> str:
    """Return what stands before the fault of a file in a message: its name, if it has one."""
    return f"{name}: " if name else ""


def source_bytes(value: Any) -> bytes | None:
    """Return the file of an image that is given as bytes or in base64; None for other forms.

    Raises:
        ImageError: a data URL is not base64.
    """
    source = _source(value)
    return source if isinstance(source, bytes) else None


def _source(value: Any) -> Any:
    """Return a Pillow image, the bytes of a file, or a path.

    Raises:
        ImageError: it is none of them.
    """
    from PIL.Image import Image

    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, ImageFile):
        return value.data
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Image | bytes | Path):
        return value
    if not isinstance(value, str) or not value:
        raise ImageError(f"{with_article(type(value).__name__)} is not an image", FORMS)

    match = SCHEME.match(value)
    scheme = "" if match is None else (match[1] or match[2]).lower()
    if scheme == "data":
        return _decoded(value)
    if scheme not in ("", "file"):
        raise ImageError(f"images are not downloaded: {scheme}://...", "download them first, and give their files")
    return Path(value[match.end() :] if match else value)


def is_path(text: str) -> bool:
    """Whether text that stands for an image is a path, and not an address."""
    return SCHEME.match(text) is None


def _decoded(url: str) -> bytes:
    head, _, text = url.partition(",")
    kind = head[len("data:") :].lower().partition("/")[0]
    if kind not in ("", "image", "application"):
        raise ImageError(f"a data URL of {clean(kind, 40)} is not an image", "only images can be used")
    if not head.lower().endswith(";base64"):
        raise ImageError("a data URL is not in base64", "write data:image/png;base64,...")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as exc:  # also of characters beyond ASCII
        raise ImageError(
            f"a data URL is not valid base64: {exc}", "encode the file again, without line breaks"
        ) from exc


def _path_hint(value: Any) -> str:
    if not isinstance(value, RowPath) or len(value.given) > LONGEST_NAME:
        return FORMS
    other = "" if value.folder != Path() else ", or else to the working directory"
    return (
        f"correct {clean(value.given)!r}: paths are relative to the folder of the rows file{other}, here "
        f"{clean(value.folder.absolute())}"
    )


def _check_file(path: Path, name: str, hint: str) -> None:
    """Refuse what is not a plain file: opening a named pipe would wait without end.

    Raises:
        ImageError: it is not, or does not exist.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as exc:  # a null character is a ValueError
        reason = (isinstance(exc, OSError) and exc.strerror) or str(exc)
        raise ImageError(f"cannot read an image: {name}: {reason}", hint) from exc
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "not a plain file"
        raise ImageError(f"cannot read an image: {name} is {what}", "give the path of a file")


def _too_large(size: str, name: str) -> ImageError:
    return ImageError(
        f"{behind(name)}an image of {size} is too large to decode", f"scale it to at most {MAX_SOURCE_PIXELS} pixels"
    )


def _reason(exc: Exception) -> str:
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    text = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
    return "it is not an image, or of an unsupported format" if "cannot identify" in text else text
