"""`ImageFile`: an image in the form in which episodes hold and send it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

MAX_PIXELS = 2**24
"""Larger images are scaled down to this; the processors of the supported models do so anyway."""


@dataclass(frozen=True, slots=True, repr=False)
class ImageFile:
    """A PNG or JPEG without rotation, transparency or further frames, of `MAX_PIXELS` at most.

    Attributes:
        data: the file.
        width, height: pixels.
        digest: BLAKE2b of `data`, in hexadecimal.
    """

    data: bytes
    width: int
    height: int
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", hashlib.blake2b(self.data, digest_size=16).hexdigest())

    def __repr__(self) -> str:
        return f"ImageFile({self.width}x{self.height}, {self.digest})"
