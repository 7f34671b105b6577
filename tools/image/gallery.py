"""`Gallery`: the images that a tool can work on in one episode. `ImageTool`: base of the tools."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from agentloop.errors import ToolConfigError
from agentloop.images import ImageFile, encoded, images_of, open_image, read_image
from agentloop.text import did_you_mean
from agentloop.tool.base import COPIED_COLUMNS, Tool
from agentloop.types import Task, ToolResult
from tools.image.boxes import COORDINATES

if TYPE_CHECKING:
    from PIL.Image import Image

INDEX_SCHEMA = {
    "type": "integer",
    "description": "Index of the image, from 0: first the images of the question, then those that this tool returned.",
}

MAX_SIDE = 1024
"""Pixels of the longer side of an image that a tool makes, if `config.max_side` is not set."""

FROM_ROW: Mapping[str, Collection[str]] = {"open": (*COPIED_COLUMNS, "image", "images")}
"""Rows of other frameworks repeat the images too, which are those of the prompt."""


class Gallery:
    """The images of an episode for one tool: those of its row, then those that the tool made."""

    def __init__(self, images: list[Any]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def get(self, index: int) -> Image:
        """Return an image in RGB.

        Raises:
            ValueError: there is none with this index. The model reads this text.
        """
        if not self._images:
            raise ValueError("the question has no image")
        if not 0 <= index < len(self._images):
            raise ValueError(f"image {index} does not exist: the images are 0 to {len(self._images) - 1}")
        file = self._images[index] = read_image(self._images[index])
        return open_image(file).convert("RGB")

    def add(self, file: ImageFile) -> int:
        """Keep an image that the tool made; return its index."""
        self._images.append(file)
        return len(self._images) - 1


class ImageTool(Tool):
    """Base of the tools that make images. They work in threads, off the event loop.

    Keys of `config`:
        coordinates: how the model gives them: `pixels`, `relative` (0 to 1), `thousandths` (0 to
            1000), or `auto`: relative if all numbers of a call are between 0 and 1, else pixels.
        max_side: longer side of a returned image at most, in pixels (1024).
        type: `native`.

    Raises:
        ToolConfigError: the config has an unknown key or a wrong value.
    """

    takes_from_row = FROM_ROW
    KEYS: ClassVar[Mapping[str, int]] = {"max_side": MAX_SIDE}
    """Keys of `config` that are numbers of pixels, with their defaults."""

    def __init__(self, config: dict[str, Any], schema: dict[str, Any]) -> None:
        super().__init__(config, schema)
        known = ["coordinates", "type", *self.KEYS]
        for key in config:
            if key not in known:
                hint = did_you_mean(str(key), known, f"known keys: {', '.join(known)}")
                raise ToolConfigError(f"{self.name}: config has the unknown key {key!r}", hint)
        self.coordinates = config.get("coordinates", "auto")
        if self.coordinates not in COORDINATES:
            raise ToolConfigError(
                f"{self.name}: config.coordinates is {self.coordinates!r}", f"one of: {', '.join(COORDINATES)}"
            )
        self.pixels = {key: config.get(key, default) for key, default in self.KEYS.items()}
        for key, value in self.pixels.items():
            if type(value) is not int or not 1 <= value <= 8192:
                raise ToolConfigError(
                    f"{self.name}: config.{key} is {value!r}", "give a number of pixels from 1 to 8192"
                )

    async def open(self, task: Task, **create_kwargs: Any) -> Gallery:
        return Gallery(list(images_of(task.prompt)))

    async def execute(self, state: Gallery, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        try:
            text, file = await asyncio.to_thread(self._made, state, arguments)
        except ValueError as exc:
            return ToolResult(f"Error: {exc}", error=str(exc))
        return ToolResult(f"Image {state.add(file)}: {text}", images=[file])

    def _made(self, gallery: Gallery, arguments: Mapping[str, Any]) -> tuple[str, ImageFile]:
        text, image = self.make(gallery, arguments)
        return text, encoded(image)

    @abstractmethod
    def make(self, gallery: Gallery, arguments: Mapping[str, Any]) -> tuple[str, Image]:
        """Return a new image, and the text that describes it.

        Raises:
            ValueError: the arguments are wrong. The model reads this text.
        """
