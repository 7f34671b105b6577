"""Images in prompts: how many tokens each one takes, and the form in which they go to the engine.

A vision-language model's template writes one placeholder an image; the model's processor repeats it once for every
token that the image becomes. The ledger holds the repeated form, the one that the engine computes with and the trainer
trains on.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentloop.errors import DataError, ModelError
from agentloop.model_folder import ModelFolder, load_image_processor
from agentloop.types import Message

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_KEYS = ("image", "image_url")


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """A model's images in tokens.

    Attributes:
        placeholder: id of the token that stands for a part of an image (`<|image_pad|>`).
        count: tokens of an image of (height, width) pixels.
    """

    placeholder: int
    count: Callable[[int, int], int]

    def expand(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """`ids` with each placeholder repeated as often as its image has tokens.

        Raises:
            ModelError: the template wrote another number of placeholders than there are images.
        """
        images = list(images_of(messages))
        places = ids.count(self.placeholder) if isinstance(ids, list) else sum(i == self.placeholder for i in ids)
        if places != len(images):
            raise ModelError(
                f"the chat template writes {places} image placeholders for {len(images)} images",
                'give images as content parts {"type": "image", "image": ...}, in messages whose role the template '
                "shows images of",
            )
        expanded: list[int] = []
        remaining = iter(images)
        for token in ids:
            if token == self.placeholder:
                image = open_image(next(remaining))
                expanded += [token] * self.count(image.height, image.width)
            else:
                expanded.append(token)
        return expanded


def load_image_tokens(model_path: str) -> ImageTokens | None:
    """How a model folder's processor counts images; None for a model without images.

    The families whose image processors merge patches (Qwen2-VL, Qwen2.5-VL, Qwen3-VL) are known.

    Raises:
        ModelError: the model takes images, but not in a way that is known, or Pillow is not installed.
    """
    folder = ModelFolder(Path(model_path))
    if not folder.has_config or not folder.takes_images:
        return None
    placeholder = folder.image_token_id
    processor = load_image_processor(model_path)
    if placeholder is None or not hasattr(processor, "get_number_of_image_patches"):
        raise ModelError(
            f"the images of {folder.model_type} cannot be counted in tokens: its processor does not say how",
            "use a model of the Qwen2-VL, Qwen2.5-VL or Qwen3-VL family",
        )
    merged = processor.merge_size**2
    return ImageTokens(
        placeholder, lambda height, width: processor.get_number_of_image_patches(height, width, {}) // merged
    )


def images_of(messages: Sequence[Message]) -> Iterator[Any]:
    """The images in messages, in the order in which a template writes them."""
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            for part in content:
                for key in IMAGE_KEYS:
                    if part.get(key) is not None:
                        yield part[key]
                        break


def open_image(value: Any) -> Image:
    """A Pillow image of what a row or a tool gives: an image, bytes, `{"bytes"}` or `{"path"}`, a path, a data URL.

    Raises:
        DataError: it is none of them, or no image.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, Image.Image):
        return value
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value.get("url")
    try:
        if isinstance(value, bytes):
            return Image.open(io.BytesIO(value))
        if isinstance(value, str) and value.startswith("data:"):
            return Image.open(io.BytesIO(base64.b64decode(value.partition(",")[2], validate=True)))
        if isinstance(value, str | Path):
            return Image.open(value)
    except (OSError, UnidentifiedImageError, binascii.Error) as exc:
        raise DataError(f"an image cannot be read: {exc}", "give PNG or JPEG data, or the path of such a file") from exc
    raise DataError(f"{type(value).__name__} is no image", "give bytes, a path, a data URL or a Pillow image")


def image_data(value: Any) -> str:
    """An image in base64, as the rollout server takes it: PNG, unless it came as bytes already."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return base64.b64encode(value["bytes"]).decode()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, str) and value.startswith("data:"):
        return value.partition(",")[2]
    buffer = io.BytesIO()
    open_image(value).convert("RGB").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
