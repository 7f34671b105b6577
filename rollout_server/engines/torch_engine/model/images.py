"""Images of requests: from base64 to what a vision tower takes, and where they stand in the prompt.

A client sends ids in which each image has one pad token (`<|image_pad|>`) for each of its merged patches, and the
images themselves in the same order. They are decoded and cut into patches here, on threads of their own: it takes tens
of milliseconds, and the event loop and the engine's thread have other requests. Nothing is ever fetched or opened by
name: a string that is no image data is a bad request.

Sizes: P prompt tokens, N patches of an image, C values of a patch.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from rollout_server.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 2**25
"""Of one image, as its header says it, before anything is decoded: a file of some kB can unfold to gigabytes."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Pillow knows more, some of which start other programs."""

READERS = 2
"""Requests whose images are decoded at once."""

PATCH_CACHE_BYTES = 2**28
"""Patches of images seen before: an image comes again with every turn of its session and every sample of its group."""

FIRST_LOOKUP_ID = 2**64
"""Lookup ids of images start here: beyond every vocabulary."""

HINT = "send base64 of a PNG, JPEG, WebP, GIF or BMP file; nothing is fetched or opened by name"

ItemT = TypeVar("ItemT")


class LruCache(Generic[ItemT]):
    """What was used last, within a number of bytes; the newest item stays, whatever its size."""

    def __init__(self, limit: int, size: Callable[[ItemT], int]) -> None:
        self._limit = limit
        self._size = size
        self._items: OrderedDict[bytes, ItemT] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: bytes) -> ItemT | None:
        item = self._items.get(key)
        if item is not None:
            self._items.move_to_end(key)
        return item

    def put(self, key: bytes, item: ItemT) -> None:
        self._items[key] = item
        self._bytes += self._size(item)
        while self._bytes > self._limit and len(self._items) > 1:
            self._bytes -= self._size(self._items.popitem(last=False)[1])

    def clear(self) -> None:
        self._items.clear()
        self._bytes = 0


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """An image as the vision tower takes it.

    Attributes:
        key: hash of the file that it came from.
        patches_NC: normalized values of its patches.
        grid_13: patches in time, height and width.
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
    """What the engine has to know of a prompt with images.

    Attributes:
        lookup_ids: the prompt's ids, each pad replaced by a number made of its image's hash, at least
            `FIRST_LOOKUP_ID`. Sequences are compared by these ids, so that prompts share cached rows only as far as
            their images are the same. With pad 9, `[4, 9, 9, 5]` becomes `[4, 2**64 + h, 2**64 + h, 5]`.
        images: in the prompt's order.
        positions_3P: rotary positions of the prompt in time, height and width.
        delta: what the position of every later token differs from its index by. An image of h x w pads moves
            positions on by max(h, w) only.
        pad: id of the pad token.
    """

    lookup_ids: list[int]
    images: tuple[PlacedImage, ...]
    positions_3P: torch.Tensor
    delta: int
    pad: int

    def real(self, lookup_ids: Sequence[int]) -> list[int]:
        """Ids of the vocabulary again."""
        return [self.pad if token >= FIRST_LOOKUP_ID else token for token in lookup_ids]

    def positions(self, start: int, end: int) -> torch.Tensor:
        """Rotary positions [3, end - start] of the sequence's tokens `[start, end)`, sampled ones included."""
        prompt = self.positions_3P.shape[1]
        later = torch.arange(max(start, prompt), max(end, prompt)) + self.delta
        return torch.cat([self.positions_3P[:, start:end], later.expand(3, -1)], dim=1)


RopeIndex = Callable[[Sequence[int], Sequence[tuple[int, int]], torch.Tensor], tuple[torch.Tensor, int]]
"""(ids, the images' `[start, end)`, their grids [I, 3]) -> positions [3, P] and the delta of later tokens."""


class ImageReader:
    """Makes an `ImagePrompt` of a request.

    Args:
        processor: the model's image processor, of the kind that merges `merge_size` ** 2 patches into a token.
        pad: id of the pad token.
        rope_index: the model's rule for positions.
    """

    def __init__(self, processor: Any, pad: int, rope_index: RopeIndex) -> None:
        self._processor = processor
        self._merged = int(processor.merge_size) ** 2
        self._pad = pad
        self._rope_index = rope_index
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="images")
        self._lock = threading.Lock()
        self._kept: LruCache[Patches] = LruCache(PATCH_CACHE_BYTES, lambda patches: patches.nbytes)
        self._in_work: dict[bytes, Future[Patches]] = {}

    async def prepare(self, input_ids: Sequence[int], image_data: Sequence[str]) -> ImagePrompt | None:
        """`read`, off the event loop's thread."""
        if not image_data and self._pad not in input_ids:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.read, input_ids, image_data)

    def read(self, input_ids: Sequence[int], image_data: Sequence[str]) -> ImagePrompt | None:
        """The prompt's images, decoded and placed; None when there are none.

        Raises:
            RequestError: an image cannot be taken, or the images do not fit the ids.
        """
        places = _runs(input_ids, self._pad)
        if len(places) != len(image_data):
            raise RequestError(
                f"input_ids hold {len(places)} runs of the image token {self._pad}, and image_data {len(image_data)} "
                "images",
                "image_data",
            )
        if not places:
            return None
        if places[-1][1] == len(input_ids):
            raise RequestError("the prompt ends within an image: there is nothing to answer yet", "input_ids")
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
        return ImagePrompt(lookup_ids, tuple(images), positions_3P, delta, self._pad)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _patches(self, text: str, field: str, start: int, end: int) -> Patches:
        """The image in `text`, whose pads are `[start, end)`.

        Raises:
            RequestError: it is no image, too large a one, or has another number of tokens.
        """
        data = _data(text, field)
        try:
            image = _open(data)
            patches = self._processor.get_number_of_image_patches(image.height, image.width, {})
        except Exception as exc:  # Pillow's readers raise whatever the bytes make them stumble over
            raise RequestError(f"{field} is no image that can be read: {_reason(exc)}; {HINT}", field) from exc
        if patches // self._merged != end - start:
            raise RequestError(
                f"{field} has {image.width} x {image.height} pixels, which are {patches // self._merged} tokens, and "
                f"input_ids hold {end - start} image tokens for it from {start} on",
                "input_ids",
            )
        try:
            return self._once(hashlib.sha256(data).digest(), image)
        except Exception as exc:
            raise RequestError(f"{field} is a broken image: {_reason(exc)}; {HINT}", field) from exc

    def _once(self, key: bytes, image: Image) -> Patches:
        """The patches of an image, made once however many requests bring it."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                return kept
            work = self._in_work.get(key)
            if work is None:
                mine = self._in_work[key] = Future()
        if work is not None:
            return work.result()
        try:
            patches = self._process(key, image)
        except Exception as exc:
            with self._lock:
                del self._in_work[key]
            mine.set_exception(exc)
            raise
        with self._lock:
            self._kept.put(key, patches)
            del self._in_work[key]
        mine.set_result(patches)
        return patches

    def _process(self, key: bytes, image: Image) -> Patches:
        made = self._processor(images=[image.convert("RGB")], return_tensors="pt")
        return Patches(key, made["pixel_values"], made["image_grid_thw"])


def _runs(ids: Sequence[int], token: int) -> list[tuple[int, int]]:
    """`[start, end)` of each run of `token`."""
    runs: list[tuple[int, int]] = []
    for place, other in enumerate(ids):
        if other == token:
            if runs and runs[-1][1] == place:
                runs[-1] = (runs[-1][0], place + 1)
            else:
                runs.append((place, place + 1))
    return runs


def _data(text: str, field: str) -> bytes:
    """The bytes of base64 text, with a `data:` head or without."""
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise RequestError(f"{field} is a data URL without base64; {HINT}", field)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise RequestError(f"{field} is no base64: {_reason(exc)}; {HINT}", field) from exc


def _open(data: bytes) -> Image:
    """The image, of which only the header is read.

    Raises:
        Exception: whatever Pillow raises; ValueError when it is too large.
    """
    from PIL import Image

    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS} that are taken")
    return image


def _reason(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]
