"""`ImageLoader`: decodes the images of messages in threads, before the conversation is rendered."""

from __future__ import annotations

import asyncio
import base64
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from agentloop.chat.images import with_files
from agentloop.errors import ImageError
from agentloop.images import ImageFile, images_of, read_image
from agentloop.types import Message

READERS = 2
"""Threads that decode images: each may need a few hundred MB for the largest one."""

REMEMBERED = 256
"""Images that are kept, because the samples of a group show the same ones."""

INLINE_BYTES = 2**20
"""Larger images are encoded in a thread: base64 of them would hold the event loop for 2 ms."""


class ImageLoader:
    """Turns images of any form into `ImageFile`s, off the event loop.

    An object that several episodes hold, like an image of a row, is decoded once for all of them.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="images")
        # The object is kept beside its file, so that no other can get the same id.
        self._known: OrderedDict[int, tuple[Any, asyncio.Future[ImageFile]]] = OrderedDict()

    async def load(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages with their images decoded; a message without images is the same
        object.

        Raises:
            ImageError: an image cannot be read; the message names its place in the conversation.
        """
        if not any(isinstance(message["content"], list) for message in messages):
            return list(messages)
        files: list[ImageFile] = []
        for number, image in enumerate(images_of(messages), 1):
            try:
                files.append(image if isinstance(image, ImageFile) else await self._file(image))
            except ImageError as exc:
                raise ImageError(f"image {number} of these messages: {exc.message}", exc.hint) from exc

        remaining = iter(files)
        return [with_files(message, remaining) for message in messages]

    async def _file(self, image: Any) -> ImageFile:
        known = self._known.get(id(image))
        if known is None:
            future = asyncio.ensure_future(asyncio.get_running_loop().run_in_executor(self._pool, read_image, image))
            future.add_done_callback(_retrieve)
            known = self._known[id(image)] = image, future
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        # An episode that is cancelled must not take the image away from the others of its group.
        return await asyncio.shield(known[1])


def _retrieve(future: asyncio.Future[ImageFile]) -> None:
    """Take note of an exception: all episodes that waited for the image may have been cancelled."""
    if not future.cancelled():
        future.exception()


async def base64_of(images: Sequence[ImageFile]) -> list[str]:
    """Return images as a request to the rollout server holds them; large ones in a thread."""
    if sum(len(image.data) for image in images) <= INLINE_BYTES:
        return _base64_of(images)
    return await asyncio.to_thread(_base64_of, images)


def _base64_of(images: Sequence[ImageFile]) -> list[str]:
    return [base64.b64encode(image.data).decode() for image in images]
