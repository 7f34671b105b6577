"""`image_zoom_in`: a part of an image, enlarged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from tools.image.boxes import MOST_RATIO, clamped, fitted, grown, numbers, shown, to_pixels
from tools.image.gallery import INDEX_SCHEMA, MAX_SIDE, Gallery, ImageTool

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageZoomIn(ImageTool):
    """Crop the box `bbox_2d` of an image. The result names the region that it shows.

    Keys of `config`, beside those of `ImageTool`:
        min_side: shorter side of a returned image at least, in pixels (336): smaller regions are
            enlarged.
        min_region: sides of the region at least, in pixels of the image (28): smaller boxes grow
            around their center.
    """

    KEYS: ClassVar[Mapping[str, int]] = {"max_side": MAX_SIDE, "min_side": 336, "min_region": 28}
    default_schema: ClassVar[dict[str, Any]] = {
        "type": "function",
        "function": {
            "name": "image_zoom_in",
            "description": "Zoom in on a region of an image: returns the region inside a bounding box, enlarged.",
            "parameters": {
                "type": "object",
                "properties": {
                    "bbox_2d": {
                        "type": "array",
                        "items": {"type": "number"},
                        "minItems": 4,
                        "maxItems": 4,
                        "description": "The bounding box of the region as [x1, y1, x2, y2]: (x1, y1) is the top left "
                        "corner, (x2, y2) the bottom right corner.",
                    },
                    "label": {"type": "string", "description": "The name of what the bounding box shows (optional)."},
                    "img_idx": INDEX_SCHEMA,
                },
                "required": ["bbox_2d"],
            },
        },
    }

    def make(self, gallery: Gallery, arguments: Mapping[str, Any]) -> tuple[str, Image]:
        index = int(arguments.get("img_idx", 0))
        given = numbers(arguments["bbox_2d"], 4, "bbox_2d")
        image = gallery.get(index)
        cut_box, cut = clamped(to_pixels(given, image.size, self.coordinates), image.size)
        box = grown(cut_box, image.size, self.pixels["min_region"], MOST_RATIO)

        crop = image.crop(box)
        size = fitted(crop.size, self.pixels["min_side"], self.pixels["max_side"])
        if size != crop.size:
            from PIL.Image import Resampling

            crop = crop.resize(size, Resampling.LANCZOS)

        label = f" ({arguments['label']:.100})" if arguments.get("label") else ""
        width, height = image.size
        text = (
            f"the region {shown(box)} of image {index}{label}, which has {width} x {height} pixels, shown at "
            f"{size[0]} x {size[1]} pixels."
        )
        if cut:
            text += " The box was cut at the image's border."
        if box != cut_box:
            text += " The box was too small, and was enlarged around its center."
        return text, crop
