"""Images of conversations: opened once, in any form, and none is lost however many there are."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from PIL import Image

from agentloop.trace.store.images import ImageFolder
from agentloop.trace.weave.images import KEPT, Images


def png(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def test_stored_images_are_opened_once_however_many_there_are(tmp_path: Path) -> None:
    folder, files = ImageFolder(tmp_path), [png(number) for number in range(KEPT + 40)]
    for data in files:
        folder.keep(hashlib.sha256(data).hexdigest(), data)
    references = [folder.reference(hashlib.sha256(data).hexdigest()) for data in files]
    images = Images()
    shown = [images.image(reference) for reference in references]
    assert [image.getpixel((0, 0)) for image in shown if image is not None] == [
        (number % 256, number // 256, 7) for number in range(len(files))
    ]
    assert images.image(dict(references[-1])) is shown[-1], "another reference to the same image"
    again = images.image(references[0])
    assert again is not None and again.getpixel((0, 0)) == (0, 0, 7), "the first one is opened again"


def test_an_image_that_cannot_be_opened_is_none_until_it_is_there(tmp_path: Path) -> None:
    images = Images()
    assert images.image("/nowhere.png") is images.image({"path": None}) is images.image(b"no image") is None
    folder, digest = ImageFolder(tmp_path), hashlib.sha256(png()).hexdigest()
    assert images.image(folder.reference(digest)) is None
    folder.keep(digest, png())
    assert images.image(folder.reference(digest)) is not None


def test_images_have_a_mode_that_weave_can_write() -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (2, 2)).save(buffer, "JPEG")
    image = Images().image(buffer.getvalue())
    assert image is not None and image.mode == "RGB"
