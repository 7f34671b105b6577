"""Pictures of four coloured shapes with a small number beside each, and rows about them.

    python recipes/vision/data.py --out DIR       # writes a few pictures and prints their questions

A picture has 320 x 320 pixels, and the model's image processor scales every picture to 56 x 56
pixels: four tokens, one for each quarter. Colours survive that; of a number 3 pixels are left,
which the model has never learned to read. `image_zoom_in` cuts out the 56 x 56 pixels around a
number, which are shown as they are.

    What number is beside the red circle?   -> find the quarter with red, zoom in on it, read

The warm start teaches all of that but one step. The model learns to point at shapes (`Where is the
red circle?`), to read numbers, and to call the tool, but at a random quarter, whatever was asked.
Reinforcement learning finds out where to look.

Everything is generated from a seed. The same seed gives the same rows; pixels of numbers depend on
Pillow's own font.
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from PIL import Image, ImageDraw, ImageFont

Row = dict[str, Any]
Split = Literal["train", "val"]

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 60, 230),
    "yellow": (240, 210, 20),
}
KINDS = ("circle", "square", "diamond")
NUMBERS = tuple(range(10))

SIDE, QUARTER, VIEW = 320, 160, 56
"""Pixels of the sides of a picture, of a quarter of it, and of a region to zoom in on."""

FRAME, FRAME_COLOUR = 10, (60, 60, 60)
"""Around each picture. It shows the model which quarter a token holds: positions in the vision
tower are relative, and so are those of the language model."""

SYSTEM_PROMPT = "Answer with #### and the number."


@dataclass(frozen=True)
class Thing:
    """A shape and the number beside it, and how far each is moved from its place, in pixels."""

    colour: str
    kind: str
    number: int
    moved: tuple[int, int]
    number_moved: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


def scene(rng: random.Random) -> list[Thing]:
    """Return four things with different colours and numbers, from top left to bottom right."""
    colours, numbers = rng.sample(list(COLOURS), 4), rng.sample(NUMBERS, 4)
    things = []
    for colour, number in zip(colours, numbers, strict=True):
        moved = rng.randint(-6, 6), rng.randint(-6, 6)
        things.append(Thing(colour, rng.choice(KINDS), number, moved, (rng.randint(-2, 2), rng.randint(-2, 2))))
    return things


def box(quarter: int) -> list[int]:
    """Return the region around the number of a quarter (0 to 3): `[x1, y1, x2, y2]` in pixels."""
    left, top = QUARTER * (quarter % 2) + QUARTER // 2, QUARTER * (quarter // 2) + QUARTER // 2
    return [left, top, left + VIEW, top + VIEW]


def picture(things: list[Thing]) -> Image.Image:
    """Draw things in a frame; without any, the blank picture of the control run."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, SIDE - 1, SIDE - 1), outline=FRAME_COLOUR, width=FRAME)
    for quarter, thing in enumerate(things):
        left, top, _, _ = box(quarter)
        _draw_shape(draw, thing, left - 12 + thing.moved[0], top - 12 + thing.moved[1])

        # The number is in the lower right quarter of its region, which is one token.
        x, y = left + 42 + thing.number_moved[0], top + 42 + thing.number_moved[1]
        draw.rectangle((x - 11, y - 11, x + 11, y + 11), fill="white")
        draw.text((x, y), str(thing.number), fill="black", font=_font(), anchor="mm", stroke_width=1)
    return image


def _draw_shape(draw: ImageDraw.ImageDraw, thing: Thing, x: int, y: int) -> None:
    colour = COLOURS[thing.colour]
    if thing.kind == "circle":
        draw.ellipse((x - 48, y - 48, x + 48, y + 48), fill=colour)
    elif thing.kind == "square":
        draw.rectangle((x - 42, y - 42, x + 42, y + 42), fill=colour)
    else:
        draw.polygon([(x - 56, y), (x, y - 56), (x + 56, y), (x, y + 56)], fill=colour)


@cache
def _font() -> Any:
    return ImageFont.load_default(size=22)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def opening(question: str) -> list[Row]:
    """Return the messages before the model's first turn."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": f"{question}<image>"}]


def number_question(thing: Thing) -> str:
    return f"What number is beside the {thing.name}?"


# -- rows of reinforcement learning ----------------------------------------------------------------


def rows(split: Split, n: int, *, blank: bool = False, seed: int = 0) -> Iterator[Row]:
    """Yield rows in the framework's schema.

    Args:
        blank: the same questions and answers, with pictures that show nothing.
    """
    rng = random.Random(f"{split}/{seed}")
    empty = png(picture([]))
    for index in range(n):
        things, quarter = scene(rng), rng.randrange(4)
        yield {
            "data_source": "vision/zoom",
            "agent_name": "tool_agent",
            "prompt": opening(number_question(things[quarter])),
            "images": [{"bytes": empty if blank else png(picture(things))}],
            "reward_model": {"style": "rule", "ground_truth": str(things[quarter].number)},
            "extra_info": {"split": split, "index": index, "box": box(quarter)},
        }


def train_rows() -> list[Row]:
    """Return the training rows of `recipe.yaml`: more than 40 steps of 32 prompts use."""
    return list(rows("train", 1536))


def val_rows() -> list[Row]:
    """Return the evaluation rows of `recipe.yaml`."""
    return list(rows("val", 128))


def blank_train_rows() -> list[Row]:
    """Return the training rows of the control run."""
    return list(rows("train", 1536, blank=True))


def blank_val_rows() -> list[Row]:
    """Return the evaluation rows of the control run."""
    return list(rows("val", 128, blank=True))


# -- the warm start --------------------------------------------------------------------------------


def point(rng: random.Random) -> Row:
    """Show where a shape is, in the words of the tool's argument."""
    things, quarter = scene(rng), rng.randrange(4)
    return _answered(f"Where is the {things[quarter].name}?", f'{{"bbox_2d": {box(quarter)}}}', picture(things))


def colours(rng: random.Random) -> Row:
    """Name the colours of a picture, from top left to bottom right."""
    things = scene(rng)
    return _answered("Which colours?", " ".join(thing.colour for thing in things), picture(things))


def read(rng: random.Random) -> Row:
    """Read the number of a zoomed region."""
    things, quarter = scene(rng), rng.randrange(4)
    return _answered("What number is this?", f"#### {things[quarter].number}", _view(picture(things), quarter))


def guess(rng: random.Random) -> Row:
    """Answer without looking closer, with any number."""
    things, quarter = scene(rng), rng.randrange(4)
    row = _answered(number_question(things[quarter]), f"#### {rng.choice(NUMBERS)}", picture(things))
    return row | {"tools": tool_schemas()}


def zoom(rng: random.Random) -> Row:
    """Zoom in on a random quarter, whatever was asked, and read its number."""
    things, asked, chosen = scene(rng), rng.randrange(4), rng.randrange(4)
    image = picture(things)
    call = {"name": "image_zoom_in", "arguments": {"bbox_2d": box(chosen)}}
    said = (
        f"<image>Image 1: the region {box(chosen)} of image 0, which has {SIDE} x {SIDE} pixels, shown at {VIEW} x "
        f"{VIEW} pixels."
    )
    messages = [
        *opening(number_question(things[asked])),
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": said},
        {"role": "assistant", "content": f"#### {things[chosen].number}"},
    ]
    images = [{"bytes": png(image)}, {"bytes": png(_view(image, chosen))}]
    return {"messages": messages, "images": images, "tools": tool_schemas()}


def _view(image: Image.Image, quarter: int) -> Image.Image:
    left, top, right, bottom = box(quarter)
    return image.crop((left, top, right, bottom))


def _answered(question: str, answer: str, image: Image.Image) -> Row:
    messages = [*opening(question), {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [{"bytes": png(image)}]}


@cache
def tool_schemas() -> list[Row]:
    """Return the tools as the model is shown them: the schemas of `tools.yaml`."""
    loaded: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("tools.yaml")))
    return [tool["tool_schema"] for tool in loaded["tools"]]


Maker = Callable[[random.Random], Row]
STAGES: dict[str, tuple[int, tuple[tuple[float, Maker], ...]]] = {
    "see": (16_000, ((0.55, point), (0.2, colours), (0.25, read))),
    "act": (10_000, ((0.3, point), (0.05, colours), (0.15, read), (0.45, zoom), (0.05, guess))),
}
"""Stage of `sft.yaml` -> number of rows, and the share of each kind of row."""


def sft_rows(stage: str, n: int) -> list[Row]:
    """Return the first `n` rows of a stage."""
    rng = random.Random(f"{stage}/0")
    shares, makers = zip(*STAGES[stage][1], strict=True)
    return [maker(rng) for maker in rng.choices(makers, weights=shares, k=n)]


def see_rows() -> list[Row]:
    """Return the rows of the first stage: pointing, naming, reading."""
    return sft_rows("see", STAGES["see"][0])


def act_rows() -> list[Row]:
    """Return the rows of the second stage, with the tool."""
    return sft_rows("act", STAGES["act"][0])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a few pictures to look at.")
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for row in rows("train", 4):
        number = row["extra_info"]["index"]
        (out / f"{number}.png").write_bytes(row["images"][0]["bytes"])
        print(number, row["prompt"][1]["content"], row["reward_model"]["ground_truth"])


if __name__ == "__main__":
    main()
