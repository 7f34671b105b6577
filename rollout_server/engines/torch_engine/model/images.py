"""Images of requests: from base64 to the patches that a vision tower takes, and their places in the
prompt.

A client sends ids in which each image has one pad token (`<|image_pad|>`) for each of its merged
patches, and the images in the same order. They are decoded and cut into patches here, on separate
threads: this takes tens of milliseconds, during which the event loop and the engine's thread serve
other requests. Nothing is fetched or opened by name: a string that is not image data is a bad
request.

Sizes: P prompt tokens, N patches of an image, C values of a patch.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rollout_server.errors import RequestError
from rollout_server.lru import LruCache
from rollout_server.placeholders import Placeholders

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 2**25
"""Largest size of an image, read from its header before it is decoded: a file of a few kB can
expand to gigabytes."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Pillow reads more formats, but some of them start other programs."""

READERS = 2
"""Number of threads that decode images."""

PATCH_CACHE_BYTES = 2**28
"""Cache of patches: an image recurs with every turn of its session and every sample of its group.
"""

FIRST_LOOKUP_ID = 2**64
"""Smallest lookup id of an image, beyond every vocabulary."""

HINT = "send base64 of a PNG, JPEG, WebP, GIF or BMP file; nothing is fetched or opened by name"


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """An image in the form that the vision tower expects.

    Attributes:
        key: hash of the image's file.
        patches_NC: normalized values of its patches.
        grid_13: number of patches in time, height and width.
    """

    key: bytes
    patches_NC: torch.Tensor
    grid_13: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.patches_NC.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class PlacedImage:
    """An image whose pads are the tokens `[start, end)` of a prompt."""

    start: int
    end: int
    patches: Patches


@dataclass(frozen=True, slots=True, eq=False)
class ImagePrompt:
    """A prompt with images.

    Attributes:
        lookup_ids: the prompt's ids, with each pad replaced by `FIRST_LOOKUP_ID` plus its image's
            hash. The cache compares these ids, so that prompts share cached rows only as far as
            their images are the same. With pad 9 and hash h,
            `[4, 9, 9, 5]` becomes `[4, 2**64 + h, 2**64 + h, 5]`.
        images: in the prompt's order.
        positions_3P: rotary positions of the prompt in time, height and width.
        delta: position minus index of every later token. An image of h x w pads advances positions
            by max(h, w) only.
        pad: id of the pad token.
    """

    lookup_ids: list[int]
    images: tuple[PlacedImage, ...]
    positions_3P: torch.Tensor
    delta: int
    pad: int

    def real(self, lookup_ids: Sequence[int]) -> list[int]:
        """The vocabulary's ids for lookup ids."""
        return [self.pad if token >= FIRST_LOOKUP_ID else token for token in lookup_ids]

    def positions(self, start: int, end: int) -> torch.Tensor:
        """Rotary positions [3, end - start] of the sequence's tokens `[start, end)`."""
        prompt = self.positions_3P.shape[1]
        later = torch.arange(max(start, prompt), max(end, prompt)) + self.delta
        return torch.cat([self.positions_3P[:, start:end], later.expand(3, -1)], dim=1)


RopeIndex = Callable[[Sequence[int], Sequence[tuple[int, int]], torch.Tensor], tuple[torch.Tensor, int]]
"""(ids, the images' `[start, end)`, their grids [I, 3]) -> positions [3, P] and the delta of later
tokens."""


class PromptImageReader:
    """Turns requests with images into `ImagePrompt`s.

    Args:
        processor: the model's image processor; it merges `merge_size` ** 2 patches into a token.
        placeholders: the model's.
        rope_index: computes the model's rotary positions.
    """

    def __init__(self, processor: Any, placeholders: Placeholders, rope_index: RopeIndex) -> None:
        self._processor = processor
        self._merged = int(processor.merge_size) ** 2
        self._placeholders = placeholders
        self._rope_index = rope_index
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="images")
        self._lock = threading.Lock()
        self._cache: LruCache[bytes, Patches] = LruCache(PATCH_CACHE_BYTES, lambda patches: patches.nbytes)
        self._in_progress: dict[bytes, Future[Patches]] = {}

    async def prepare(self, input_ids: Sequence[int], image_data: Sequence[str]) -> ImagePrompt | None:
        """Call `read` on another thread."""
        if not image_data and self._placeholders.image not in input_ids:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.read, input_ids, image_data)

    def read(self, input_ids: Sequence[int], image_data: Sequence[str]) -> ImagePrompt | None:
        """Decode and place the prompt's images; None if there are no images.

        Raises:
            RequestError: an image cannot be read, or the images do not match the ids.
        """
        places = self._placeholders.check(input_ids, len(image_data))
        if not places:
            return None
        if places[-1][1] == len(input_ids):
            raise RequestError("the prompt ends with an image token; add the tokens that follow it", "input_ids")

        images = [
            PlacedImage(start, end, self._patches(text, f"image_data.{i}", start, end))
            for i, ((start, end), text) in enumerate(zip(places, image_data, strict=True))
        ]

        lookup_ids = list(input_ids)
        for image in images:
            number = FIRST_LOOKUP_ID + int.from_bytes(image.patches.key[:16])
            lookup_ids[image.start : image.end] = [number] * (image.end - image.start)

        grids = torch.cat([image.patches.grid_13 for image in images])
        positions_3P, delta = self._rope_index(input_ids, places, grids)
        return ImagePrompt(lookup_ids, tuple(images), positions_3P, delta, self._placeholders.image)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _patches(self, text: str, field: str, start: int, end: int) -> Patches:
        """Return the patches of the image in `text`, whose pads are `[start, end)`.

        Raises:
            RequestError: not an image, too large, or its number of tokens differs.
        """
        data = _data(text, field)
        try:
            image = _open(data)
            patches = self._processor.get_number_of_image_patches(image.height, image.width, {})
        except Exception as exc:  # Pillow's readers raise many kinds of errors for damaged files
            raise RequestError(f"{field} is not a readable image: {_reason(exc)}; {HINT}", field) from exc

        if patches // self._merged != end - start:
            raise RequestError(
                f"{field} has {image.width} x {image.height} pixels, which become {patches // self._merged} tokens, "
                f"but input_ids have {end - start} image tokens for it at {start}",
                "input_ids",
            )

        try:
            return self._once(hashlib.sha256(data).digest(), image)
        except Exception as exc:
            raise RequestError(f"{field} is a damaged image: {_reason(exc)}; {HINT}", field) from exc

    def _once(self, key: bytes, image: Image) -> Patches:
        """Return the patches of an image, computed once even for concurrent requests."""
        with self._lock:
            cached = self._cache.get(key)
            if cached is not None:
                return cached
            work = self._in_progress.get(key)
            if work is None:
                mine = self._in_progress[key] = Future()
        if work is not None:
            return work.result()

        try:
            patches = self._process(key, image)
        except Exception as exc:
            with self._lock:
                del self._in_progress[key]
            mine.set_exception(exc)
            raise

        with self._lock:
            self._cache.put(key, patches)
            del self._in_progress[key]
        mine.set_result(patches)
        return patches

    def _process(self, key: bytes, image: Image) -> Patches:
        made = self._processor(images=[image.convert("RGB")], return_tensors="pt")
        return Patches(key, made["pixel_values"], made["image_grid_thw"])


def _data(text: str, field: str) -> bytes:
    """Decode base64 text, with or without a `data:` header."""
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise RequestError(f"{field} is a data URL that is not base64; {HINT}", field)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise RequestError(f"{field} is not base64: {_reason(exc)}; {HINT}", field) from exc


def _open(data: bytes) -> Image:
    """Open an image and read its header only.

    Raises:
        Exception: any error of Pillow; ValueError if the image is too large.
    """
    from PIL import Image

    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {MAX_PIXELS}")
    return image


def _reason(exc: Exception) -> str:
    text = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
    return "of another format, or not an image" if "cannot identify" in text else text
