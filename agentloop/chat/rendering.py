"""Rendering and encoding together: contents stay text, whatever control tokens they spell."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

from agentloop.chat.images import ImageTokens
from agentloop.chat.sampled import SampledText
from agentloop.chat.template import Template, Tools, texts
from agentloop.chat.tokenizer import SafeEncoder
from agentloop.errors import ModelError
from agentloop.images import images_of
from agentloop.types import Message

MARK = "\ue0a7"
"""A private-use character that encloses the number of a control token during rendering."""

LONGEST_CONTROL = 256
"""Maximum characters of a control token."""

MOST_SCHEMAS = 1024
"""Largest number of tool schema lists that are remembered."""

Render = Callable[[Sequence[Message], Tools], str]


class Rendering:
    """A template and the encoder of its text.

    Args:
        template: renders messages.
        encoder: encodes what it renders.
        images: how images count in tokens; None: messages contain no images.
    """

    def __init__(self, template: Template, encoder: SafeEncoder, images: ImageTokens | None = None) -> None:
        self.template = template
        self.encoder = encoder
        self._images = images
        self._numbers = itertools.count(1)
        self._by_identity: dict[tuple[int, ...], tuple[int, Tools]] = {}
        self._by_text: dict[str, int] = {}
        self._marked: dict[int, bool] = {}

    def schemas_key(self, tools: Tools) -> int:
        """Return a number that identifies these schemas; 0 for no schemas.

        Lists of the same objects are recognized by identity, without reading them.
        """
        if not tools:
            return 0

        identity = tuple(map(id, tools))
        known = self._by_identity.get(identity)
        if known is None:
            if len(self._by_identity) >= MOST_SCHEMAS:  # an agent builds new ones each episode
                self._by_identity.clear()
                self._by_text.clear()

            text = json.dumps(list(tools), sort_keys=True, default=repr)
            number = self._by_text.setdefault(text, next(self._numbers))
            # The schemas are kept alive, so that no other object can get the same id.
            known = self._by_identity[identity] = (number, list(tools))
        return known[0]

    def renders(self, messages: Sequence[Message], tools: Tools = None) -> bool:
        """Whether the template accepts these messages."""
        try:
            self.template.render(messages, tools, generate=False)
        except ModelError:
            return False
        return True

    def encode(self, messages: Sequence[Message], tools: Tools, render: Render) -> list[int]:
        """Return the ids of the rendered messages. Control tokens in messages and tools stay plain
        text.

        Raises:
            ModelError: the messages contain images that the model does not take, or the template
                does not render each image once.
        """
        images = any(isinstance(message["content"], list) for message in messages) and any(images_of(messages))
        if images and self._images is None:
            # Before rendering: the template of a text model would fail with another reason.
            raise ModelError(
                "the messages contain images, but the model does not accept images", "use a vision-language model"
            )
        text = self.protected(messages, tools, render)
        ids = self.encoder.encode_protected(text, MARK) if MARK in text else self.encoder.encode(text)
        return self._images.expand(ids, messages) if images and self._images is not None else ids

    def protected(self, messages: Sequence[Message], tools: Tools, render: Render) -> str:
        """Return the rendering with marks in place of the control tokens that contents spell.

        All control tokens left in it are the template's own.
        """
        if not self.has_marks(messages, tools):
            return render(messages, tools)

        protected = [_separate_parts(_map_texts(message, self._protect)) for message in messages]
        return render(protected, _map_texts(list(tools), self._protect) if tools else None)

    def has_marks(self, messages: Sequence[Message], tools: Tools) -> bool:
        """Whether `protected` replaces anything by marks."""
        return self._has_marks(list(messages)) or self._tools_have_marks(tools)

    def harmless(self, text: str) -> str:
        """Return a name made up by the model in a form that is safe in the probe's turn."""
        return text if self.encoder.is_plain(text) and MARK not in text else self._protect(text)

    def _has_marks(self, contents: Any) -> bool:
        """Whether a text spells a control token, or could do so with the text around it."""
        return any(not self.encoder.is_plain(text) or MARK in text for text in texts(contents))

    def _tools_have_marks(self, tools: Tools) -> bool:
        if not tools:
            return False
        number = self.schemas_key(tools)
        if number not in self._marked:
            self._marked[number] = self._has_marks(list(tools))
        return self._marked[number]

    def _protect(self, text: str) -> str:
        return self.encoder.protect(text.replace(MARK, "\ufffd"), MARK)

    def common_prefix(self, one: str, two: str) -> int:
        """Return how many characters both renderings begin with; control tokens count whole."""
        size = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))

        for text in (one, two):
            for match in self.encoder.pattern.finditer(text, max(size - LONGEST_CONTROL, 0)):
                if match.start() < size < match.end():
                    size = match.start()
                if match.start() >= size:
                    break
        return size

    def text_of(self, ids: list[int]) -> SampledText:
        """Return the text of sampled ids, with the positions of their control tokens."""
        controls = self.encoder.ids
        places = [i for i, token in enumerate(ids) if token in controls]
        pieces: list[str] = []
        found: dict[int, str] = {}
        position = begin = 0
        before: list[int] = []

        for i in places:
            if i > begin:
                pieces.append(self._decode_after(before, ids[begin:i]))
                position += len(pieces[-1])
            found[position] = spelling = self.encoder.spelling[ids[i]]
            pieces.append(spelling)
            position += len(spelling)
            before, begin = [ids[i]], i + 1

        if begin < len(ids):
            pieces.append(self._decode_after(before, ids[begin:]))
        return SampledText("".join(pieces), found, self.encoder.spellings)

    def _decode_after(self, before: list[int], ids: list[int]) -> str:
        """Decode ids after a control token; alone, some tokenizers drop their leading space."""
        if not before:
            return self.encoder.decode(ids)
        return self.encoder.decode(before + ids)[len(self.encoder.spelling[before[0]]) :]


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of a message with every string changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    return value


def _separate_parts(message: Message) -> Message:
    """Put an empty mark between text parts, so that no two of them form a control token."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [{**part, "text": MARK + MARK + part["text"]} if "text" in part else part for part in content]
    return {**message, "content": parts}
