"""Rendering and encoding together: contents are text, whatever control tokens are spelled in them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

from agentloop.chat.images import ImageTokens, images_of
from agentloop.chat.sampled import SampledText
from agentloop.chat.template import Template, Tools, texts
from agentloop.chat.tokenizer import SafeEncoder
from agentloop.errors import ModelError
from agentloop.types import Message

MARK = "\ue0a7"
"""Stands around the number of a control token while its content is rendered; a private-use character."""

LONGEST_CONTROL = 256
"""Characters; no control token is longer."""

MOST_SCHEMAS = 1024
"""Lists of tool schemas that are known again."""

Render = Callable[[Sequence[Message], Tools], str]


class Rendering:
    """A template and the encoder of its text.

    Args:
        template: renders messages.
        encoder: encodes what it renders.
        images: how images count in tokens; None: messages hold no images.
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
        """A number for these schemas, 0 for none. Lists that hold the same objects are known without reading them."""
        if not tools:
            return 0
        identity = tuple(map(id, tools))
        known = self._by_identity.get(identity)
        if known is None:
            if len(self._by_identity) >= MOST_SCHEMAS:  # a loop that makes new schemas for every episode
                self._by_identity.clear()
                self._by_text.clear()
            text = json.dumps(list(tools), sort_keys=True, default=repr)
            number = self._by_text.setdefault(text, next(self._numbers))
            # The schemas are kept, so that no other object can get the same identity.
            known = self._by_identity[identity] = (number, list(tools))
        return known[0]

    def renders(self, messages: Sequence[Message], tools: Tools = None) -> bool:
        """Whether the template takes these messages."""
        try:
            self.template.render(messages, tools, generate=False)
        except ModelError:
            return False
        return True

    def encode(self, messages: Sequence[Message], tools: Tools, render: Render) -> list[int]:
        """Encode what `render` makes of the messages; control tokens in them and in the tools stay plain text."""
        text = self.protected(messages, tools, render)
        ids = self.encoder.encode_protected(text, MARK) if MARK in text else self.encoder.encode(text)
        if any(isinstance(message["content"], list) for message in messages) and any(images_of(messages)):
            if self._images is None:
                raise ModelError("the messages hold images, and the model takes none", "use a vision-language model")
            return self._images.expand(ids, messages)
        return ids

    def protected(self, messages: Sequence[Message], tools: Tools, render: Render) -> str:
        """The rendering, in which control tokens are the template's alone: those in contents are under marks."""
        if not self.has_marks(messages, tools):
            return render(messages, tools)
        protected = [_separate_parts(_map_texts(message, self._protect)) for message in messages]
        return render(protected, _map_texts(list(tools), self._protect) if tools else None)

    def has_marks(self, messages: Sequence[Message], tools: Tools) -> bool:
        """Whether `protected` puts anything under marks."""
        return self._has_marks(list(messages)) or self._tools_have_marks(tools)

    def harmless(self, text: str) -> str:
        """A name that the model made up, for the probe's turn, which is the template's part of a rendering."""
        return text if self.encoder.is_plain(text) and MARK not in text else self._protect(text)

    def _has_marks(self, contents: Any) -> bool:
        """Whether a control token is spelled anywhere in them, or could be together with what stands around."""
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
        """How many characters two renderings begin with alike, none of them a part of a control token that differs."""
        size = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        for text in (one, two):
            for match in self.encoder.pattern.finditer(text, max(size - LONGEST_CONTROL, 0)):
                if match.start() < size < match.end():
                    size = match.start()
                if match.start() >= size:
                    break
        return size

    def text_of(self, ids: list[int]) -> SampledText:
        """The text of sampled ids, with the places of their control tokens."""
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
        """Text of ids that stand behind a control token: alone, some tokenizers would drop their leading space."""
        if not before:
            return self.encoder.decode(ids)
        return self.encoder.decode(before + ids)[len(self.encoder.spelling[before[0]]) :]


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a message with every string of it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    return value


def _separate_parts(message: Message) -> Message:
    """Put a mark that stands for nothing between text parts, so that no two make up a control token."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [{**part, "text": MARK + MARK + part["text"]} if "text" in part else part for part in content]
    return {**message, "content": parts}
