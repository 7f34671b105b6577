"""Generated geometry problems with diagrams, in the form of geometry3k: for a first try."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

ROWS = {"train": 48, "test": 12}
SIZES = ((240, 180), (320, 240), (280, 280))

TRIPLES = ((3, 4, 5), (6, 8, 10), (5, 12, 13), (8, 15, 17), (9, 12, 15), (7, 24, 25))

Made = tuple[str, "Image", str]
"""Text of a problem, its diagram, its answer."""


def problems(split: str) -> list[tuple[str, list[dict[str, Any]], str]]:
    """Return (problem, images, answer) of each problem of `train` or `test`; always the same."""
    rng = random.Random(f"geo3k {split}")
    kinds: list[Callable[[random.Random], Made]] = [_hypotenuse, _angle, _area, _diagonal]
    found = []
    for number in range(ROWS[split]):
        text, image, answer = kinds[number % len(kinds)](rng)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        found.append((f"<image>{text}", [{"bytes": buffer.getvalue(), "path": f"{split}/{number}.png"}], answer))
    return found


def _hypotenuse(rng: random.Random) -> Made:
    short, long, hypotenuse = rng.choice(TRIPLES)
    width, height = rng.choice(SIZES)
    corners = [(30, height - 30), (width - 40, height - 30), (30, 30)]
    middle, half = width // 2, height // 2
    labels = {(middle, height - 26): str(long), (8, half): str(short), (middle + 4, half - 24): "x"}
    return "Find $x$.", _drawn((width, height), corners, labels), str(hypotenuse)


def _angle(rng: random.Random) -> Made:
    first, second = rng.randrange(35, 75), rng.randrange(35, 75)
    width, height = rng.choice(SIZES)
    base = width - 60
    tangents = [math.tan(math.radians(angle)) for angle in (first, second)]
    top = base * tangents[1] / sum(tangents)
    rise = min(height - 60.0, top * tangents[0])
    left, right, up = (30, height - 30), (30 + base, height - 30), (30 + round(top), height - 30 - round(rise))
    labels = {(50, height - 48): f"{first}°", (base - 20, height - 48): f"{second}°", (up[0] - 4, up[1] + 14): "x"}
    question = "Find the measure of the angle $x$, in degrees."
    return question, _drawn((width, height), [left, right, up], labels), str(180 - first - second)


def _area(rng: random.Random) -> Made:
    wide, high = rng.randrange(5, 20), rng.randrange(3, 15)
    width, height = rng.choice(SIZES)
    corners = [(30, height - 30), (width - 30, height - 30), (width - 30, 30), (30, 30)]
    labels = {(width // 2, height - 26): str(wide), (8, height // 2): str(high)}
    return "Find the area of the rectangle.", _drawn((width, height), corners, labels), str(wide * high)


def _diagonal(rng: random.Random) -> Made:
    side = rng.randrange(2, 20)
    corners = [(30, 210), (210, 210), (210, 30), (30, 30), (30, 210), (210, 30)]
    labels = {(116, 214): str(side), (100, 96): "d"}
    return "Find the diagonal $d$ of the square.", _drawn((240, 240), corners, labels), rf"{side}\sqrt{{2}}"


def _drawn(size: tuple[int, int], corners: list[tuple[int, int]], labels: dict[tuple[int, int], str]) -> Image:
    """Return a diagram: a closed line through the corners, and texts."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.line([*corners, corners[0]], fill="black", width=2)
    font = ImageFont.load_default(size=16)
    for place, text in labels.items():
        draw.text(place, text, fill="black", font=font)
    return image
