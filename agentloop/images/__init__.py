"""Images of rows, tools and messages, on their way to the engine and the trainer.

An image arrives in any form (`open_image`) and with anything a file can hold: a rotation in its
EXIF data, transparency, CMYK, several frames, a hundred megapixels. `read_image` turns it once into
an `ImageFile`, a small plain PNG or JPEG. The count of its tokens, the engine and the trainer all
start from that same file, so none of them can see another picture.

Imports Pillow only when an image is opened: runs without images need none of it.
"""

from agentloop.images.file import MAX_PIXELS, ImageFile
from agentloop.images.opening import IMAGE_KEYS, MAX_SOURCE_PIXELS, RowPath, check_form, is_path, open_image
from agentloop.images.plain import encoded, image_data, image_size, read_image
from agentloop.images.shown import image_key, images_of, row_place

__all__ = [
    "IMAGE_KEYS",
    "MAX_PIXELS",
    "MAX_SOURCE_PIXELS",
    "ImageFile",
    "RowPath",
    "check_form",
    "encoded",
    "image_data",
    "image_key",
    "image_size",
    "images_of",
    "is_path",
    "open_image",
    "read_image",
    "row_place",
]
