"""Images of earlier requests, which later ones name: an image is sent once, not with every turn."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from agentloop.wire import IMAGE_NAME, LEAST_NAMED_IMAGE, GenerateRequest, image_name
from rollout_server.errors import RequestError, UnknownImage
from rollout_server.lru import LruCache

MOST_BYTES = 2**28
"""Characters of base64 that are kept. A session's images are used every turn, and stay."""


class KeptImages:
    """Keeps the images of requests, and puts them where a request names them.

    Any thread may call it.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._images: LruCache[str, str] = LruCache(most_bytes, len)
        self._lock = threading.Lock()

    def put_in_place(self, requests: Sequence[GenerateRequest]) -> None:
        """Replace the names in requests by their images, and keep the images that they hold.

        Raises:
            UnknownImage: an image is named that is not kept (any more).
            RequestError: the requests are a batch, and one names an image.
        """
        for request in requests:
            given = request.image_data
            if isinstance(given, str):
                request.image_data = self._whole(given, len(requests))
            elif given is not None:
                request.image_data = [self._whole(image, len(requests)) for image in given]

    def _whole(self, image: str, batch: int) -> str:
        if not image.startswith(IMAGE_NAME):
            if len(image) >= LEAST_NAMED_IMAGE:
                name = image_name(image)
                with self._lock:
                    self._images.put(name, image)
            return image
        if batch > 1:
            # Its bound on the images of all answers counts the characters that were sent.
            raise RequestError("the images of a batch cannot be named: send them whole", "image_data")
        with self._lock:
            kept = self._images.get(image)
        if kept is None:
            raise UnknownImage("a named image is not kept here: send the images whole", "image_data")
        return kept
