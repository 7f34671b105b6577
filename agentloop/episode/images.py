"""`ImageLoader`: decodes the images of messages in threads, before the conversation is rendered."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from agentloop.chat.images import with_files
from agentloop.errors import ImageError
from agentloop.images import ImageFile, images_of, read_image, row_place
from agentloop.types import Message, Task

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
            ImageError: an image cannot be read; with its number.
        """
        if not any(isinstance(message["content"], list) for message in messages):
            return list(messages)
        files: list[ImageFile] = []
        for number, image in enumerate(images_of(messages), 1):
            try:
                files.append(await self.file(image))
            except ImageError as exc:
                raise ImageError(exc.message, exc.hint, number) from exc

        remaining = iter(files)
        return [with_files(message, remaining) for message in messages]

    async def file(self, image: Any) -> ImageFile:
        """Return an image decoded.

        Raises:
            ImageError: it cannot be read.
        """
        if isinstance(image, ImageFile):
            return image
        known = self._known.get(id(image))
        if known is None:
            future = asyncio.ensure_future(asyncio.get_running_loop().run_in_executor(self._pool, read_image, image))
            future.add_done_callback(_retrieve)
            known = self._known[id(image)] = image, future
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        # An episode that is cancelled must not take the image away from the others of its group.
        return await asyncio.shield(known[1])


@contextlib.contextmanager
def named_images(messages: Sequence[Message], task: Task) -> Iterator[None]:
    """Say of an image that cannot be loaded or rendered whether it comes from the row or a tool.

    Args:
        messages: those that are loaded and rendered, before their images are decoded.
    """
    try:
        yield
    except ImageError as exc:
        raise _named(exc, messages, task) from exc


def _named(error: ImageError, messages: Sequence[Message], task: Task) -> ImageError:
    shown = [(image, message) for message in messages for image in images_of([message])]
    if error.number is None or error.number > len(shown):
        return error
    image, message = shown[error.number - 1]
    own = next((number for number, one in enumerate(images_of(task.prompt), 1) if one is image), None)
    if own is not None:
        place = f"row {task.task_id}: {row_place(own, task.prompt, task.images, 'prompt')}"
    elif message["role"] == "tool":
        place = f"an image of the tool {message.get('name', '')}"
    else:
        place = f"image {error.number} of these messages"
    return ImageError(f"{place}: {error.message}", error.hint, error.number)


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
