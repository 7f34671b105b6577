"""Coordinates as models write them: pixels, fractions or thousandths; from the top left corner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

COORDINATES = ("auto", "pixels", "relative", "thousandths")

MOST_RATIO = 50
"""Longer side by shorter side of a region at most, as far as the image has it."""

THINNEST_STRIP = 150
"""Longer side by shorter side of what is shown at most: processors refuse images of more than 200.
"""

Size = tuple[int, int]
Box = tuple[int, int, int, int]


def numbers(value: Any, count: int, name: str) -> list[float]:
    """Return a list of `count` finite numbers.

    Raises:
        ValueError: it is something else. The model reads this text.
    """
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"{name} has to be a list of {count} numbers")
    for number in value:
        # Not with math.isfinite: an integer may have any number of digits.
        if isinstance(number, bool) or not isinstance(number, int | float) or not -math.inf < number < math.inf:
            raise ValueError(f"{name} has to be a list of {count} numbers, not {number!r:.40}")
        if abs(number) > 1e9:
            raise ValueError(f"{name} has a number that is too large")
    return [float(number) for number in value]


def to_pixels(values: Sequence[float], size: Size, coordinates: str) -> list[float]:
    """Return coordinates x, y, x, y, ... in pixels of an image of `size`."""
    if coordinates == "auto":
        coordinates = "relative" if all(0 <= value <= 1 for value in values) else "pixels"
    scale = {"pixels": None, "relative": 1.0, "thousandths": 1000.0}[coordinates]
    if scale is None:
        return list(values)
    return [value / scale * size[index % 2] for index, value in enumerate(values)]


def clamped(corners: Sequence[float], size: Size) -> tuple[Box, bool]:
    """Return the part of a box that lies in the image, in whole pixels, and whether it was cut.

    Args:
        corners: x1, y1, x2, y2 in pixels; either corner may come first.

    Raises:
        ValueError: no part of it lies in the image. The model reads this text.
    """
    (width, height), (x1, y1, x2, y2) = size, corners
    left, right = sorted((x1, x2))
    top, bottom = sorted((y1, y2))
    if right < 0 or bottom < 0 or left >= width or top >= height:
        raise ValueError(f"the box {shown(corners)} lies outside the image of {width} x {height} pixels")
    cut = left < 0 or top < 0 or right > width or bottom > height
    begin = max(0, math.floor(left)), max(0, math.floor(top))
    return (*begin, min(width, math.ceil(right)), min(height, math.ceil(bottom))), cut


def grown(box: Box, size: Size, least: int, most_ratio: int) -> Box:
    """Return a box with sides of at least `least` pixels, and no longer than `most_ratio` times its
    width; as far as the image has them.
    """
    width, height = box[2] - box[0], box[3] - box[1]
    shorter = max(least, math.ceil(max(width, height) / most_ratio))
    left, right = _grown_side(box[0], box[2], max(width, shorter), size[0])
    top, bottom = _grown_side(box[1], box[3], max(height, shorter), size[1])
    return left, top, right, bottom


def fitted(size: Size, least: int, most: int) -> Size:
    """Return the size at which a part of an image is shown.

    Args:
        least: shorter side at least.
        most: longer side at most; it wins. Strips are widened to `THINNEST_STRIP`.
    """
    scale = min(max(1.0, least / min(size)), most / max(size))
    width, height = (max(1, round(side * scale)) for side in size)
    thinnest = math.ceil(max(width, height) / THINNEST_STRIP)
    return max(width, thinnest), max(height, thinnest)


def shown(corners: Sequence[float]) -> str:
    """Return coordinates as text: `[10, 20, 30.5, 40]`."""
    return f"[{', '.join(f'{value:g}' for value in corners)}]"


def _grown_side(low: int, high: int, length: int, limit: int) -> tuple[int, int]:
    length = min(length, limit)
    begin = min(max(0, (low + high - length) // 2), limit - length)
    return (low, high) if high - low >= length else (begin, begin + length)
