"""`SentImages`: images that a rollout server keeps, and which requests name instead."""

from __future__ import annotations

from collections.abc import Sequence

from agentloop.wire import LEAST_NAMED_IMAGE, image_name

MOST_NAMES = 2**16
"""Names that are remembered; then all are forgotten, and images are sent again."""


class SentImages:
    """Replaces images that were sent before by their names (`agentloop.wire.image_name`).

    A server that keeps images says so in `/server_info` (`keeps_images`). It drops the ones that
    were not used for longest, and all when it restarts: it then refuses a request with the error
    type `unknown_image`, and the caller calls `forget` and sends the images whole.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()

    def named(self, images: Sequence[str]) -> list[str]:
        """Return images, base64-encoded, with names in the place of those that were sent."""
        if not self._names:
            return list(images)
        return [self._name(image) or image for image in images]

    def sent(self, images: Sequence[str]) -> None:
        """Note the images of a request that the server answered."""
        if len(self._names) > MOST_NAMES:
            self._names.clear()
        self._names.update(image_name(image) for image in images if len(image) >= LEAST_NAMED_IMAGE)

    def forget(self) -> None:
        self._names.clear()

    def _name(self, image: str) -> str | None:
        if len(image) < LEAST_NAMED_IMAGE:
            return None
        name = image_name(image)
        return name if name in self._names else None
