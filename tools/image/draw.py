"""`draw_on_image`: lines, boxes, points and labels on an image, for auxiliary constructions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from tools.image.boxes import clamped, fitted, numbers, to_pixels
from tools.image.gallery import INDEX_SCHEMA, Gallery, ImageTool

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

COLORS = ("red", "green", "blue", "orange", "purple", "black", "white", "yellow")
KINDS = ("line", "box", "point", "label")
KEYS = ("type", "bbox_2d", "point_2d", "label", "color")

MOST_SHAPES = 64
MOST_CHARACTERS = 100
"""Characters of a label."""

LARGEST_FONT = 200
"""Pixels. The text of a label is an image of its own: on a long strip it would have gigabytes."""


class DrawOnImage(ImageTool):
    """Draw the list `shapes` on an image; coordinates beyond its border are moved to it.

    Keys of `config`: those of `ImageTool`.
    """

    default_schema: ClassVar[dict[str, Any]] = {
        "type": "function",
        "function": {
            "name": "draw_on_image",
            "description": "Draw lines, boxes, points and labels on an image, and return the result.",
            "parameters": {
                "type": "object",
                "properties": {
                    "shapes": {
                        "type": "array",
                        "description": "What to draw, in order.",
                        "items": {
                            "type": "object",
                            "properties": {
                                "type": {"type": "string", "enum": list(KINDS)},
                                "bbox_2d": {
                                    "type": "array",
                                    "items": {"type": "number"},
                                    "description": "[x1, y1, x2, y2]: corners of a box, or ends of a line.",
                                },
                                "point_2d": {
                                    "type": "array",
                                    "items": {"type": "number"},
                                    "description": "[x, y]: the place of a point or a label.",
                                },
                                "label": {"type": "string", "description": "Text beside the shape."},
                                "color": {"type": "string", "enum": list(COLORS)},
                            },
                            "required": ["type"],
                        },
                    },
                    "img_idx": INDEX_SCHEMA,
                },
                "required": ["shapes"],
            },
        },
    }

    def make(self, gallery: Gallery, arguments: Mapping[str, Any]) -> tuple[str, Image]:
        from PIL import ImageDraw
        from PIL.Image import Resampling

        index = int(arguments.get("img_idx", 0))
        shapes = arguments["shapes"]
        if not shapes or len(shapes) > MOST_SHAPES:
            raise ValueError(f"shapes has {len(shapes)} entries: give 1 to {MOST_SHAPES}")
        image = gallery.get(index)
        size = image.size
        canvas = _Canvas(ImageDraw.Draw(image), size, self.coordinates)
        for number, shape in enumerate(shapes):
            try:
                canvas.draw(shape)
            except ValueError as exc:
                raise ValueError(f"shapes[{number}]: {exc}") from None

        text = f"image {index} with {_counted(shapes)}, {size[0]} x {size[1]} pixels."
        if canvas.moved:
            text += " Coordinates beyond the border were moved to it."
        display = fitted(size, 1, self.pixels["max_side"])
        if display != size:
            image = image.resize(display, Resampling.LANCZOS)
            text += f" It is shown at {image.width} x {image.height} pixels."
        return text, image


class _Canvas:
    """Draws shapes.

    Attributes:
        moved: whether a coordinate lay beyond the border.
    """

    def __init__(self, draw: ImageDraw, size: tuple[int, int], coordinates: str) -> None:
        self._draw = draw
        self._size = size
        self._coordinates = coordinates
        self._width = max(2, round(max(size) / 250))
        self.moved = False

    def draw(self, shape: Any) -> None:
        """Draw one shape.

        Raises:
            ValueError: it is malformed. The model reads this text.
        """
        kind = shape.get("type") if isinstance(shape, dict) else None
        if kind not in KINDS:
            raise ValueError(f"type has to be one of {', '.join(KINDS)}")
        unknown = [key for key in shape if key not in KEYS]
        if unknown:
            raise ValueError(f"{unknown[0]!r:.40} is not one of {', '.join(KEYS)}")
        color, label = shape.get("color") or "red", shape.get("label") or ""
        if color not in COLORS:
            raise ValueError(f"color has to be one of {', '.join(COLORS)}")
        if not isinstance(label, str) or len(label) > MOST_CHARACTERS or (kind == "label" and not label.strip()):
            raise ValueError(f"label has to be text of 1 to {MOST_CHARACTERS} characters")

        draw: Callable[[Any, str], tuple[float, float]] = getattr(self, f"_{kind}")
        place = draw(shape, color)
        if label:
            self._text(place, label, color)

    def _line(self, shape: Any, color: str) -> tuple[float, float]:
        x1, y1, x2, y2 = self._inside(numbers(shape.get("bbox_2d"), 4, "bbox_2d"))
        self._draw.line((x1, y1, x2, y2), fill=color, width=self._width)
        return (x1 + x2) / 2, (y1 + y2) / 2

    def _box(self, shape: Any, color: str) -> tuple[float, float]:
        corners = to_pixels(numbers(shape.get("bbox_2d"), 4, "bbox_2d"), self._size, self._coordinates)
        (left, top, right, bottom), cut = clamped(corners, self._size)
        self.moved |= cut
        self._draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=color, width=self._width)
        return left, top

    def _point(self, shape: Any, color: str) -> tuple[float, float]:
        x, y = self._inside(numbers(shape.get("point_2d"), 2, "point_2d"))
        radius = 2 * self._width
        self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        return x + radius, y

    def _label(self, shape: Any, color: str) -> tuple[float, float]:
        x, y = self._inside(numbers(shape.get("point_2d"), 2, "point_2d"))
        return x, y

    def _inside(self, values: list[float]) -> list[float]:
        pixels = to_pixels(values, self._size, self._coordinates)
        inside = [min(max(0.0, value), self._size[index % 2] - 1.0) for index, value in enumerate(pixels)]
        self.moved |= any(value < 0 or value > self._size[index % 2] for index, value in enumerate(pixels))
        return inside

    def _text(self, place: tuple[float, float], text: str, color: str) -> None:
        """Write beside a place, moved so that the text stays in the image."""
        from PIL import ImageFont

        font = ImageFont.load_default(size=min(max(12, round(max(self._size) / 30)), LARGEST_FONT))
        left, top, right, bottom = self._draw.textbbox((0, 0), text, font=font)
        gap = 2 * self._width
        x = max(0.0, min(place[0] + gap, self._size[0] - (right - left) - 1))
        y = max(0.0, min(place[1] + gap, self._size[1] - (bottom - top) - 1))
        outline = "black" if color in ("white", "yellow") else "white"
        self._draw.text((x - left, y - top), text, fill=color, font=font, stroke_width=1, stroke_fill=outline)


def _counted(shapes: list[dict[str, Any]]) -> str:
    kinds = [shape["type"] for shape in shapes]
    plurals = {"box": "boxes"}
    return ", ".join(
        f"{count} {kind if count == 1 else plurals.get(kind, kind + 's')}"
        for kind in KINDS
        if (count := kinds.count(kind))
    )
