"""Files of weave: the parts of images and other values, and the code of ops, named by digest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Message

from agentloop.viewer.received import Received
from agentloop.viewer.weave.values import checked, digest_of, text
from agentloop.web.bodies import read_body
from agentloop.web.refusals import Refusal

_DIGEST = re.compile(r"[A-Za-z0-9]{43}")

_IMAGES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
}


async def create(received: Received, request: Request) -> dict[str, Any]:
    """Store a file of a multipart form, once for each digest."""
    body = await read_body(request)

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async with Request(request.scope, receive).form(max_files=1, max_fields=8) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise Refusal(422, "the form has no file")
        content = await file.read()
        fields = {key: value for key, value in form.items() if isinstance(value, str)}
    text(fields, "project_id")
    digest = checked(digest_of(content), {key: value or None for key, value in fields.items()})
    await run_in_threadpool(received.add_file, digest, content)
    return {"digest": digest}


def content(received: Received, body: Mapping[str, Any]) -> Response:
    """Return a file's bytes."""
    return answer(received, text(body, "digest"))


def answer(received: Received, digest: str) -> Response:
    """Return a file's bytes; a browser shows it only if it is an image without scripts."""
    path = received.file(digest)
    if _DIGEST.fullmatch(digest) is None or not path.is_file():
        raise Refusal(404, f"the file {digest[:60]!r} does not exist")
    with path.open("rb") as file:
        head = file.read(12)
    kind = next((kind for magic, kind in _IMAGES.items() if head.startswith(magic)), None)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        kind = "image/webp"
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    if kind is None:
        headers["Content-Disposition"] = "attachment"
    return FileResponse(path, media_type=kind or "application/octet-stream", headers=headers)


def stored_bytes(received: Received, _: Mapping[str, Any]) -> dict[str, Any]:
    """Return the size of all files."""
    folder = received.file("00").parents[1]
    sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"total_size_bytes": sum(sizes)}
