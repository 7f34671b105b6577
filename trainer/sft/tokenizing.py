"""Turn rows into the token ids and mask that a rollout of the same conversation would have.

A conversation `system, user, assistant, tool, assistant` is assembled by the `ChatRenderer` as in
an agent loop (`G` is the generation prompt `<|im_start|>assistant\\n`, `E` the end-of-turn token):

    ids   ..question.. G         | 12 + 3 E | \\n ..result.. G         | #### 15 E
    from  start(messages before) | turn_ids | extend(messages after) | turn_ids
    mask  0                      | 1        | 0                      | 1

The prompt and the messages between turns are tokenized; a turn's ids are those that the model has
to sample in a rollout. Tokens are never merged across a segment border, and earlier turns stay as
sampled even where the template would later render them differently. The end-of-turn token is
trained, the generation prompt is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agentloop.chat import ChatRenderer, load_tokenizer
from agentloop.chat.images import load_image_tokens, with_files
from agentloop.chat.proof.conversations import Abilities, find_abilities
from agentloop.chat.proof.proof import Verdict, prove
from agentloop.chat.template import read_template
from agentloop.config import SftModel
from agentloop.errors import DataError, ImageError, ModelError
from agentloop.images import ImageFile, images_of, read_image, row_place
from agentloop.model_folder import ModelFolder
from agentloop.types import Message, StopReason
from trainer.sft.rows import Conversation, conversation_of

MIN_SHARED_PREFIX = 8
"""Tokens below which a common prefix is not worth a separate attention call."""

MOST_SCHEMAS = 1024
"""Lists of tool schemas that are cached."""

PROVEN_ON = 40
"""Conversations that prove a template before it is used for several turns, as in a training run."""


class Segment(NamedTuple):
    """Ids that belong together, for each whether it is trained, and the images among them."""

    ids: list[int]
    flags: list[bool]
    images: tuple[ImageFile, ...] = ()


@dataclass(slots=True)
class SftRow:
    """A tokenized row. Token 0 is never trained.

    Attributes:
        token_ids: int32 [T].
        loss_mask: bool [T].
        images: uint8; its image files, in the order of their placeholders.
        text_length: tokens before the first image; all of them without images.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    images: tuple[np.ndarray, ...] = ()
    text_length: int | None = None

    @property
    def shareable(self) -> int:
        """Length of the longest prefix that other rows can share: without loss and images."""
        length = int(np.argmax(self.loss_mask))
        return length if self.text_length is None else min(length, self.text_length)


class SftTokenizer:
    """Tokenizes conversations and plain text.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        renderer: renderer of the model's chat template, or the reason why there is none, which is
            raised for conversations.
        max_tokens: maximum tokens of a row.
        overlong: what to do with a longer row: `error`, `drop` or `truncate`.
        vocabulary: number of ids that the model has; None: unknown.
        context: longest sequence of the model; None: unknown.

    Attributes:
        dropped, truncated: numbers of rows that were too long and left out or cut.
    """

    def __init__(
        self,
        tokenizer: Any,
        renderer: ChatRenderer | ModelError,
        max_tokens: int,
        *,
        overlong: str = "error",
        vocabulary: int | None = None,
        context: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._renderer = renderer
        in_context = context is not None and context < max_tokens
        self._max_tokens = context if context is not None and in_context else max_tokens
        self._limit_name = f"the model's context of {context} tokens" if in_context else f"max_tokens {max_tokens}"
        self._overlong = overlong
        self._vocabulary = vocabulary
        self._abilities: dict[bool, Abilities] = {}
        self._proven: set[bool] = set()
        self._schemas: dict[str, list[dict[str, Any]]] = {}
        self.dropped = 0
        self.truncated = 0

    @classmethod
    def load(cls, model: SftModel, max_tokens: int, *, overlong: str = "error") -> SftTokenizer:
        """Load a model folder's tokenizer, with the recipe's chat template or its own.

        Raises:
            ModelError: there is no tokenizer, or the recipe's chat template cannot be used.
        """
        tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
        template = read_template(model.chat_template, "model.chat_template")
        renderer: ChatRenderer | ModelError
        try:
            renderer = ChatRenderer(
                tokenizer,
                template,
                chat_template_kwargs=model.chat_template_kwargs,
                tool_role=model.tool_role,
                images=load_image_tokens(model.path, trust_remote_code=model.trust_remote_code),
            )
        except ModelError as exc:
            if template is not None:
                raise
            renderer = exc  # plain text needs no template

        folder = ModelFolder(Path(model.path))
        vocabulary, context = (folder.vocab_size, folder.context_length) if folder.has_config else (None, None)
        return cls(tokenizer, renderer, max_tokens, overlong=overlong, vocabulary=vocabulary, context=context)

    def row(self, row: dict[str, Any], where: str) -> SftRow | None:
        """Tokenize `{messages, tools?}` or `{text, loss_from?}`; None: dropped, because too long.

        Args:
            where: file and row, for messages.

        Raises:
            DataError: the row has neither form, is too long, or cannot be rendered.
        """
        if "messages" in row:
            renderer = self._renderer
            takes_images = not isinstance(renderer, ModelError) and renderer.image_token is not None
            segments = self._conversation(conversation_of(row, where, takes_images=takes_images), where)
        elif "text" in row:
            segments = self._text(*_text_columns(row, where))
        else:
            raise DataError(
                f"{where} has neither column 'messages' nor 'text', only {sorted(row)}",
                "rename the column that holds them",
            )

        if not any(any(segment.flags) for segment in segments):
            raise DataError(f"{where} has no token to train", 'add an assistant message without "train": false')
        return self._fitted(segments, where)

    def _fitted(self, segments: list[Segment], where: str) -> SftRow | None:
        """Join the segments into a row; with `truncate`, as many of them as fit."""
        limit = self._max_tokens
        length = sum(len(segment.ids) for segment in segments)
        if length > limit:
            if self._overlong == "error":
                raise DataError(
                    f"{where} has {length} tokens, more than {self._limit_name}",
                    "raise max_tokens up to the model's context, or set overlong=drop or overlong=truncate",
                )
            if self._overlong == "truncate":
                # Also drop a trailing context: nothing after it is trained.
                while segments and (length > limit or not any(segments[-1].flags)):
                    length -= len(segments.pop().ids)
            if self._overlong == "drop" or not segments:
                self.dropped += 1
                return None
            self.truncated += 1

        ids = np.array([token for segment in segments for token in segment.ids], dtype=np.int32)
        mask = np.array([trained for segment in segments for trained in segment.flags], dtype=bool)
        if self._vocabulary is not None and ids.max() >= self._vocabulary:
            raise DataError(
                f"{where}: the tokenizer encodes {self._tokenizer.decode([int(ids.max())])!r} as id {ids.max()}, but "
                f"the model has only {self._vocabulary} ids",
                "use the model's own tokenizer, or resize the model's embeddings",
            )

        mask[:1] = False  # nothing precedes the first token to predict it from
        if not mask.any():
            raise DataError(
                f"{where} has no token to train",
                "the first token of a row is never trained: add text before it",
            )
        images = tuple(np.frombuffer(image.data, dtype=np.uint8) for segment in segments for image in segment.images)
        if not images:
            return SftRow(ids, mask)
        assert not isinstance(self._renderer, ModelError) and self._renderer.image_token is not None
        return SftRow(ids, mask, images, int(np.argmax(ids == self._renderer.image_token)))

    def _text(self, text: str, loss_from: int) -> list[Segment]:
        """Return one segment per token: plain text may be cut anywhere."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [
            Segment([token], [start >= loss_from])
            for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def _conversation(self, conversation: Conversation, where: str) -> list[Segment]:
        """Return context and turn alternately, up to the model's last turn."""
        renderer, messages = self._renderer, _decoded(conversation, where)
        if isinstance(renderer, ModelError):
            raise DataError(f"{where} has messages: {renderer.message}", renderer.hint)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        tools, trained = self._known(conversation.tools), conversation.trained

        segments: list[Segment] = []
        ids: list[int] = []
        begin = 0
        try:
            self._check(renderer, conversation, tools, turns)
            for index in turns:
                context = messages[begin:index]
                shown = renderer.extend(ids, StopReason.STOP, context, tools) if ids else renderer.start(context, tools)
                said = renderer.turn_ids(messages[index])
                images = tuple(images_of(context))
                segments += [Segment(shown, [False] * len(shown), images), Segment(said, [trained[index]] * len(said))]
                ids += [*shown, *said]
                begin = index + 1
        except ModelError as exc:
            raise DataError(f"{where}: {exc.message}", exc.hint) from exc
        except ImageError as exc:  # the model does not take its shape
            number = None if exc.number is None else sum(len(segment.images) for segment in segments) + exc.number
            raise _located_error(exc, number, conversation, where) from exc
        return segments

    def _known(self, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """Return one object for equal schemas: the renderer caches by identity."""
        if not tools:
            return None
        if len(self._schemas) >= MOST_SCHEMAS:
            self._schemas.clear()
        return self._schemas.setdefault(repr(tools), tools)

    def _check(
        self, renderer: ChatRenderer, conversation: Conversation, tools: list[dict[str, Any]] | None, turns: list[int]
    ) -> None:
        """Refuse a conversation that the chat template cannot render completely or continue.

        Raises:
            ModelError: the reason and what to change.
        """
        has_tools = bool(tools)
        if has_tools not in self._abilities:
            self._abilities[has_tools] = find_abilities(renderer, tools)
        missing = self._abilities[has_tools].missing

        messages = conversation.messages
        said = [messages[index] for index in turns]
        with_calls = [message for message in said if message.get("tool_calls")]
        needs = {
            "tool schemas": has_tools,
            "system messages": messages[0]["role"] == "system",
            "tool calls": bool(with_calls),
            "several tool calls in one turn": any(len(message["tool_calls"]) > 1 for message in with_calls),
            "text beside tool calls": any(message["content"] for message in with_calls),
            "reasoning": any("reasoning_content" in message for message in said),
        }
        for ability, needed in needs.items():
            if needed and ability in missing:
                reason, _, fix = missing[ability].partition("\n  fix: ")
                raise ModelError(f"the row needs {ability}: {reason}", fix or "use another chat template")

        first = messages[: turns[0]] if turns else []
        if turns and all(message["role"] != "user" for message in first):
            _check_shown(renderer, first)

        if len(turns) > 1 and has_tools not in self._proven:
            proof = prove(renderer, tools, count=PROVEN_ON)
            if proof.verdict is Verdict.REFUSED:
                raise ModelError(
                    f"the chat template cannot carry several turns: {proof.reason}",
                    "set model.chat_template to one that passes `agentloop template`",
                )
            self._proven.add(has_tools)


def _decoded(conversation: Conversation, where: str) -> list[Message]:
    """Return the messages with their images decoded to plain files, as an episode does.

    Raises:
        DataError: an image cannot be read; the row and its column are named.
    """
    files: list[ImageFile] = []
    for number, image in enumerate(images_of(conversation.messages), 1):
        try:
            files.append(read_image(image))
        except ImageError as exc:
            raise _located_error(exc, number, conversation, where) from exc
    remaining = iter(files)
    return [with_files(message, remaining) for message in conversation.messages]


def _located_error(exc: ImageError, number: int | None, conversation: Conversation, where: str) -> ImageError:
    """Return the error of an image with its row and column; `number`: its place in the row."""
    place = row_place(number, conversation.messages, conversation.images, "messages")
    return ImageError(f"{where}: {place}: {exc.message}", exc.hint, number)


def _text_columns(row: dict[str, Any], where: str) -> tuple[str, int]:
    """Return the text of a row and the character from which on it is trained."""
    text, loss_from = row["text"], row.get("loss_from")
    if not isinstance(text, str):
        raise DataError(f"{where}: column 'text' is of type {type(text).__name__}, not text", "write a string")
    if loss_from is None:
        return text, 0
    whole = isinstance(loss_from, int) or (isinstance(loss_from, float) and loss_from.is_integer())
    if not whole or loss_from < 0:
        raise DataError(f"{where}: column 'loss_from' is {loss_from!r}", "write the number of a character, from 0")
    return text, int(loss_from)


def _check_shown(renderer: ChatRenderer, context: Sequence[Message]) -> None:
    """Check a context without a user message: some templates drop its system message.

    Raises:
        ModelError: the template does not render one of the messages.
    """
    if not context:
        try:
            renderer.start([])
        except ModelError as exc:
            raise ModelError(
                "the chat template cannot begin with an assistant message", "put a user or system message first"
            ) from exc
        return

    text = renderer.template.render(context, None, generate=True)
    for message in context:
        if str(message["content"]).strip() not in text:
            raise ModelError(
                f"the chat template leaves out a message of role {message['role']} that no user message follows",
                "put a user message before the assistant's",
            )


def shared_prefix(rows: Sequence[SftRow]) -> np.ndarray:
    """Return the untrained prefix of more than half of the rows, often the system message.

    Rows with this prefix are packed as one group: it is computed once per micro-batch.
    """
    firsts: dict[bytes, list[np.ndarray]] = {}
    for row in rows:
        context = row.token_ids[: row.shareable]
        if len(context) >= MIN_SHARED_PREFIX:
            firsts.setdefault(context[:MIN_SHARED_PREFIX].tobytes(), []).append(context)

    members = max(firsts.values(), key=len, default=[])
    if 2 * len(members) <= len(rows):
        return np.zeros(0, dtype=np.int32)

    length = min(len(context) for context in members)
    same = np.logical_and.reduce([context[:length] == members[0][:length] for context in members])
    return members[0][: length if same.all() else int(np.argmin(same))]
