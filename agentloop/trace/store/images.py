"""Images of traces: `traces/images/<sha256>.<ext>`, each once, however many episodes show it."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from agentloop.errors import DataError
from agentloop.files import write_atomic
from agentloop.images import IMAGE_KEYS, image_data
from agentloop.types import Message

_SIGNATURES = {
    b"\x89PNG": "png",
    b"\xff\xd8\xff": "jpg",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\x00": "tif",
    b"MM\x00*": "tif",
}

UNREADABLE = "unreadable"
"""Stands for the digest of an image that cannot be read."""


class Digests:
    """Digests of images, each computed once for an object that many trajectories share.

    Args:
        keep: called with digest and bytes of each image, the first time it is seen.
    """

    def __init__(self, keep: Callable[[str, bytes], None]) -> None:
        self._keep = keep
        self._of: dict[int, tuple[Any, str]] = {}  # the object keeps its id from being reused
        self._seen: set[str] = set()

    def of(self, image: Any) -> str:
        """Return the digest of an image, in any form that `agentloop.images` opens."""
        known = self._of.get(id(image))
        if known is None:
            known = self._of[id(image)] = (image, self._digest(image))
        return known[1]

    def _digest(self, image: Any) -> str:
        if isinstance(image, dict) and set(image) <= {"sha256", "path"} and "sha256" in image:
            return str(image["sha256"])  # read from a trace
        try:
            data = base64.b64decode(image_data(image))
        except (DataError, OSError, binascii.Error, ValueError, ImportError):
            return UNREADABLE
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._seen:
            self._seen.add(digest)
            self._keep(digest, data)
        return digest

    def message(self, message: Message) -> Message:
        """Return a message whose images are `{"sha256": digest}`."""
        content = message.get("content")
        if not isinstance(content, list) or not any(_has_image(part) for part in content):
            return message
        return {**message, "content": [self._part(part) for part in content]}

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        if not _has_image(part):
            return part
        shown = {key: {"sha256": self.of(part[key])} for key in IMAGE_KEYS if part.get(key) is not None}
        return {**part, **shown}


def _has_image(part: Any) -> bool:
    return isinstance(part, dict) and any(part.get(key) is not None for key in IMAGE_KEYS)


class ImageFolder:
    """The folder of a run's images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, digest: str, data: bytes) -> None:
        """Write an image, unless it is there.

        Raises:
            DiskError: the disk is full or broken.
        """
        path = self.folder / f"{digest}.{extension(data)}"
        if not path.is_file():
            write_atomic(path, data, durable=False)

    def find(self, digest: str) -> Path | None:
        """Return the file of an image; None if there is none, or `digest` is not a digest."""
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            return None
        return next((path for path in self.folder.glob(f"{digest}.*") if path.suffix != ".tmp"), None)

    def located(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages in which each stored image also has its `path`.

        Traces may come from others: an image that is neither stored nor a data URL, such as the
        path of a file of this machine, is replaced by one that cannot be read.
        """
        return [self._located(message) for message in messages]

    def _located(self, message: Message) -> Message:
        content = message.get("content")
        if not isinstance(content, list) or not any(map(_has_image, content)):
            return message
        parts = [
            {**part, **{key: self.trusted(part[key]) for key in IMAGE_KEYS if part.get(key) is not None}}
            if isinstance(part, dict)
            else part
            for part in content
        ]
        return {**message, "content": parts}

    def trusted(self, image: Any) -> Any:
        """Return an image of a trace as `located` describes."""
        if isinstance(image, dict) and isinstance(image.get("sha256"), str):
            return self.reference(image["sha256"])
        url = image.get("url") if isinstance(image, dict) else image
        if isinstance(url, str) and url.startswith("data:"):
            return url
        return {"sha256": UNREADABLE}

    def reference(self, digest: str) -> dict[str, str]:
        """Return an image as messages of a trace hold it: `sha256`, and `path` if it is there."""
        path = self.find(digest)
        return {"sha256": digest} if path is None else {"sha256": digest, "path": str(path)}


def extension(data: bytes) -> str:
    """Return the extension of an image file by its first bytes; `img` if they are unknown."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((ending for start, ending in _SIGNATURES.items() if data.startswith(start)), "img")
