"""Images of a run's trace, by digest."""

from __future__ import annotations

import re
from pathlib import Path

from starlette.responses import FileResponse, Response

from agentloop.web.refusals import Refusal

TYPES = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp",
    ".bmp": "image/bmp",
}  # fmt: skip
"""Formats without scripts. Anything else is sent as bytes to be saved, never shown."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


def image_response(found: Path | None, folder: Path, digest: str) -> Response:
    """Return an image file of a run.

    Args:
        found: the file of the digest in `folder`; None: there is none.
    """
    if not _DIGEST.fullmatch(digest):
        raise Refusal(400, f"{digest[:80]!r} is not the SHA-256 digest of an image", "give 64 hexadecimal digits")
    # A link in the folder could lead out of it.
    if found is None or found.is_symlink() or not found.is_file() or folder.is_symlink():
        raise Refusal(404, f"the trace has no image {digest}")
    kind = TYPES.get(found.suffix.lower())
    headers = {
        "Cache-Control": "private, max-age=31536000, immutable",  # named by its content
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "X-Content-Type-Options": "nosniff",
    }
    if kind is None:
        headers["Content-Disposition"] = f'attachment; filename="{digest}"'
    return FileResponse(found, media_type=kind or "application/octet-stream", headers=headers)
