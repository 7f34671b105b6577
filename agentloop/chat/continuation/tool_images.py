"""Images in tool results, for chat templates that show images in user turns only.

A template with a tool role may write only the text of a result. Its images then follow in a user
turn, behind the results of the same turn:

    tool  crop of image 0            tool  crop of image 0
          <image>              ->    user  <image>
                                           Image returned by image_zoom_in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentloop.chat.continuation.probe import CALL_ID, QUESTION, TOOL, calling, result, user
from agentloop.chat.template import Template
from agentloop.errors import ModelError
from agentloop.images import IMAGE_KEYS, images_of
from agentloop.types import Message

Content = str | list[dict[str, Any]]


def has_tool_images(messages: Sequence[Message]) -> bool:
    """Whether a tool message has an image."""
    return any(
        message["role"] == "tool" and isinstance(message["content"], list) and any(images_of([message]))
        for message in messages
    )


def shows_tool_images(template: Template, placeholder: str) -> bool:
    """Whether a template writes `placeholder` for an image in a tool's result."""
    shown: Message = {**result("x"), "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "x"}]}
    try:
        text = template.render([user(QUESTION), calling([TOOL], [CALL_ID]), shown], None, generate=True)
    except ModelError:
        return False
    return placeholder in text


def fold_tool_images(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with the images of each run of tool messages in a user message behind it.

    A user message that follows the run anyway takes them, in front of its own content. The order of
    the images stays.
    """
    folded: list[Message] = []
    waiting: list[dict[str, Any]] = []
    names: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            content = message["content"]
            images = [part for part in content if _is_image(part)] if isinstance(content, list) else []
            waiting += images
            names += [str(message.get("name") or "the tool")] * bool(images)
            folded.append({**message, "content": text_of(content)} if images else message)
            continue
        if waiting:
            if message["role"] == "user":
                message = {**message, "content": joined([_shown(waiting, names), message["content"]], "\n")}
            else:
                folded.append({"role": "user", "content": _shown(waiting, names)})
            waiting, names = [], []
        folded.append(message)
    if waiting:
        folded.append({"role": "user", "content": _shown(waiting, names)})
    return folded


def joined(contents: Sequence[Content], separator: str) -> Content:
    """Return contents as one: text if all are text, else parts in which adjacent texts are one."""
    if all(isinstance(content, str) for content in contents):
        return separator.join(map(str, contents))
    parts: list[dict[str, Any]] = []
    for number, content in enumerate(contents):
        added = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in [{"type": "text", "text": separator}, *added] if number and separator else added:
            if parts and _is_text(part) and _is_text(parts[-1]):
                parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
            else:
                parts.append(part)
    return [part for part in parts if not _is_text(part) or part["text"]]


def text_of(content: Content) -> str:
    """Return the texts of a content."""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content)


def _shown(images: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    what = "Image" if len(images) == 1 else "Images"
    return [*images, {"type": "text", "text": f"{what} returned by {', '.join(dict.fromkeys(names))}."}]


def _is_text(part: dict[str, Any]) -> bool:
    return isinstance(part.get("text"), str)


def _is_image(part: dict[str, Any]) -> bool:
    return any(part.get(key) is not None for key in IMAGE_KEYS)
