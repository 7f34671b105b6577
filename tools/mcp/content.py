"""What a server answers, as text and images for the model."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from typing import Any

from mcp_types import AudioContent, CallToolResult, EmbeddedResource, ImageContent, ResourceLink, TextContent

from agentloop.errors import ImageError
from agentloop.images import ImageFile, read_image
from agentloop.types import ToolResult, bounded_text

MOST_IMAGES = 16
"""Images of one result that are shown."""


async def read_answer(answer: CallToolResult, *, images: bool) -> ToolResult:
    """Return the model's view of an answer. Errors of the tool itself are text for the model.

    Args:
        images: show images; otherwise a note stands for each.
    """
    texts: list[str] = []
    shown: list[ImageFile] = []
    for block in answer.content:
        if isinstance(block, ImageContent):
            if not images or len(shown) >= MOST_IMAGES:
                texts.append("[an image, which is not shown]")
                continue
            try:
                shown.append(await asyncio.to_thread(_image, block.data))
            except ImageError as exc:
                texts.append(f"[an image that cannot be shown: {exc.message}]")
        else:
            texts.append(_text(block))
    if not answer.content and answer.structured_content is not None:
        texts.append(json.dumps(answer.structured_content, ensure_ascii=False))

    text = bounded_text("\n".join(texts))
    if answer.is_error:
        text = text or "the tool failed without a reason"
        return ToolResult(text if text.startswith("Error") else f"Error: {text}", error=text, images=list(shown))
    return ToolResult(text, images=list(shown))


def _image(data: str) -> ImageFile:
    try:
        return read_image(base64.b64decode(data, validate=True))
    except binascii.Error as exc:
        raise ImageError(f"it is not base64: {exc}") from exc


def _text(block: Any) -> str:
    if isinstance(block, TextContent):
        return block.text
    if isinstance(block, ResourceLink):
        return f"{block.name}: {block.uri}"
    if isinstance(block, EmbeddedResource):
        text = getattr(block.resource, "text", None)
        return text if isinstance(text, str) else f"[the file {block.resource.uri}, which is not text]"
    if isinstance(block, AudioContent):
        return "[audio, which is not shown]"
    return f"[{type(block).__name__}, which is not shown]"
