"""Images in prompts: how many tokens each one takes.

A vision-language model's template writes one placeholder for each image; the model's processor
repeats it once for every token of the image. The ledger holds the repeated form, with which the
engine computes and on which the trainer trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from agentloop.errors import ImageError, ModelError
from agentloop.images import ImageFile, image_key, image_size, images_of
from agentloop.model_folder import ModelFolder, load_image_processor
from agentloop.types import Message


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """The numbers of tokens that a model's images take.

    Attributes:
        placeholder: id of the token that represents a part of an image (`<|image_pad|>`).
        count: returns the number of tokens of an image of (height, width) pixels.
    """

    placeholder: int
    count: Callable[[int, int], int]

    def expand(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """Return `ids` with each placeholder repeated once for every token of its image.

        Raises:
            ModelError: the number of placeholders differs from the number of images.
            ImageError: an image cannot be read, or the model's processor refuses its shape; with
                its number.
        """
        images = list(images_of(messages))
        places = ids.count(self.placeholder) if isinstance(ids, list) else sum(i == self.placeholder for i in ids)
        if places != len(images):
            raise ModelError(
                f"the chat template writes {places} image placeholders for {len(images)} images",
                'give images as content parts {"type": "image", "image": ...}, in messages of a role for which the '
                "template shows images",
            )

        expanded: list[int] = []
        remaining = iter(enumerate(images, 1))
        for token in ids:
            if token == self.placeholder:
                number, image = next(remaining)
                try:
                    expanded += [token] * self._tokens_of(image)
                except ImageError as exc:
                    raise ImageError(exc.message, exc.hint, number) from exc
            else:
                expanded.append(token)
        return expanded

    def _tokens_of(self, image: Any) -> int:
        width, height = image_size(image)
        try:
            return self.count(height, width)
        except ValueError as exc:  # the families refuse strips: 200 times as long as wide
            raise ImageError(
                f"the model does not take an image of {width} x {height} pixels: {exc}", "cut or pad the image"
            ) from exc


def load_image_tokens(model_path: str, *, trust_remote_code: bool = False) -> ImageTokens | None:
    """Return how a model folder's processor counts images; None for a model without images.

    Supported are the families whose image processors merge patches: Qwen2-VL, Qwen2.5-VL, Qwen3-VL.

    Raises:
        ModelError: the model's image processor is not supported, or Pillow is not installed.
    """
    folder = ModelFolder(Path(model_path))
    if not folder.has_config or not folder.takes_images:
        return None

    placeholder = folder.image_token_id
    processor = load_image_processor(model_path, trust_remote_code=trust_remote_code)
    if placeholder is None or not hasattr(processor, "get_number_of_image_patches"):
        raise ModelError(
            f"cannot count the image tokens of a {folder.model_type} model: its processor does not report them",
            "use a model of the Qwen2-VL, Qwen2.5-VL or Qwen3-VL family",
        )

    merged = processor.merge_size**2
    return ImageTokens(
        placeholder, lambda height, width: processor.get_number_of_image_patches(height, width, {}) // merged
    )


def with_files(message: Message, files: Iterator[ImageFile]) -> Message:
    """Return a message with its images replaced by the next files."""
    if not any(True for _ in images_of([message])):
        return message
    parts: list[Any] = []
    for part in message["content"]:
        key = image_key(part)
        parts.append(part if key is None else {**cast("dict[str, Any]", part), key: next(files)})
    return {**message, "content": parts}
