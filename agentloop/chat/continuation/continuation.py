"""Find what a template writes after an assistant's turn, by rendering it after a known turn.

The text after a known answer was written by the template, whatever the real history is, so the cost
does not depend on the length of the history. This requires a template that only appends: a template
that changes earlier turns, counts them or omits messages is refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from agentloop.chat.continuation.copied_text import TemplateTextCache
from agentloop.chat.continuation.probe import (
    ANSWER,
    CALL_ID,
    QUESTION,
    TOOL,
    VALUE,
    assistant,
    calling,
    end_of_words,
    is_call,
    result,
    user,
)
from agentloop.chat.continuation.turn_end import TurnEnd, find_turn_end, without_generation_prompt
from agentloop.chat.rendering import Rendering
from agentloop.chat.template import Tools
from agentloop.errors import ModelError
from agentloop.types import Message

MOST_HISTORIES = 1024
"""Largest number of probe turns with calls, by the calls' names and ids, that are cached."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """The ids that follow a sampled turn, up to and including the generation prompt.

    Attributes:
        ids: all of them, from the token that ends the turn on.
        closed: `ids[:closed]` ends the turn; 0 if no token ends one, and `ids[0]` opens the next
            turn.
        lead: `ids[:lead]` may be in the trajectory already: what ends the turn and the separator
            after it, or the token that opens the next turn.
        moves_system: the template moves a system message once these messages follow.
    """

    ids: array[int]
    closed: int
    lead: int
    moves_system: bool = False


class Continuations:
    """Computes the continuations of one template."""

    def __init__(self, rendering: Rendering) -> None:
        self._rendering = rendering
        self._template = rendering.template
        self._encoder = rendering.encoder
        self._ends: dict[tuple[int, int], TurnEnd] = {}
        self._can_append: dict[tuple[Any, ...], tuple[bool, bool]] = {}
        self._shown_calls: dict[int, bool] = {}
        self._histories: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Message]] = {}
        self._text_cache = TemplateTextCache(self._template.strings())
        self._boundaries: dict[Hashable, tuple[int, int, bool]] = {}
        self._separators: set[tuple[int, ...]] = set()

    @cached_property
    def answer_end(self) -> TurnEnd:
        """The end of a plain answer.

        Raises:
            ModelError: no token ends an answer, and none opens the next turn.
        """
        return self._turn_end([user(QUESTION), assistant(ANSWER)], None)

    @cached_property
    def call_end(self) -> TurnEnd | None:
        """The end of a turn with a call; None if the template renders no calls, or no results."""
        try:
            return self._turn_end([user(QUESTION), calling([TOOL], [CALL_ID])], None)
        except ModelError:
            return None

    @cached_property
    def openings(self) -> dict[bool, int]:
        """The token that opens the next turn, by "the turn has calls"; if no token ends a turn."""
        if self.answer_end.closer is not None:
            return {}

        opening = self._opening_after([user(QUESTION), assistant(ANSWER)], user("x"), self.answer_end)
        if self.call_end is None:
            return {False: opening, True: opening}

        history = [user(QUESTION), calling([TOOL], [CALL_ID])]
        return {False: opening, True: self._opening_after(history, result("x"), self.call_end)}

    def find(self, messages: Sequence[Message], tools: Tools, names: tuple[str, ...]) -> Continuation:
        """Return the continuation with which a template writes these messages after a turn.

        The messages are rendered after a probe turn, and what comes before the probe's end is cut
        off.

        Args:
            messages: only the new ones.
            tools: the schemas of the conversation.
            names: the called tools, one for each tool message at the beginning of `messages`.

        Raises:
            ModelError: the template cannot render them, or does more than append them.
        """
        # Try the cheapest way first: a single message of a known shape is filled in.
        shape = self._shape(messages, tools, names)
        text = None
        if shape is not None:
            text = self._text_cache.fill(shape, messages[0], lambda changed: self._render([changed], tools, names))
            boundaries = self._boundaries.get(shape)  # once: a thread may clear them
            if text is not None and boundaries is not None:
                return Continuation(array("i", self._encoder.encode(text)), *boundaries)

        # The context comes before the encoding: it refuses templates that do not only append.
        history, end, moves_system, _ = self._context(messages, tools, names)
        ids = (
            self._encoder.encode(text)
            if text is not None
            else self._rendering.encode(messages, tools, lambda m, t: self._render(m, t, names))
        )
        closed, following, lead = self._split(ids, history, end)

        # The boundaries of a shape are the same for every content, if all of them lie before the
        # content.
        if text is not None and following < len(self._encoder.encode(self._text_cache.before(shape))):
            if len(self._boundaries) >= MOST_HISTORIES:
                self._boundaries.clear()
            self._boundaries[shape] = closed, lead, moves_system

        return Continuation(array("i", ids), closed, lead, moves_system)

    def _split(self, ids: list[int], history: list[Message], end: TurnEnd) -> tuple[int, int, int]:
        """Return `closed`, the place of the control token that opens the next turn, and `lead`."""
        controls = self._encoder.ids

        # An answer's ids begin right after its last words, so its closer is the nth control token.
        # After a call the closers of the call itself were cut off, and the first control token is
        # the turn's.
        count = 1 if end.closer is None or is_call(history) else end.nth
        position = -1
        for _ in range(count):
            position = next(i for i in range(position + 1, len(ids)) if ids[i] in controls)

        if end.closer is None:
            return 0, position, position + 1

        closed = position + 1
        following = next((i for i in range(closed, len(ids)) if ids[i] in controls), closed)
        lead = following if self._is_separator(tuple(ids[closed:following])) else closed
        return closed, following, lead

    def _context(
        self, messages: Sequence[Message], tools: Tools, names: tuple[str, ...]
    ) -> tuple[list[Message], TurnEnd, bool, Tools]:
        """Return the probe before the messages, the end of its turn, whether the template moves a
        system message, and the tools if the text after the turn depends on them.
        """
        history = self._history(messages, names)
        end = self._turn_end(history, tools)
        moves_system, tools_matter = self._check_appends(history, messages, tools, end)
        # Most templates write the schemas before the turn only; then they need not be rendered
        # again.
        return history, end, moves_system, tools if tools_matter else None

    def _render(self, messages: Sequence[Message], tools: Tools, names: tuple[str, ...]) -> str:
        """Return the template's text from the end of the probe's turn on."""
        history, end, _, tools = self._context(messages, tools, names)
        text = self._template.render([*history, *messages], tools, generate=True)
        return text[self._start_of_continuation(text, history, end) :]

    def _shape(self, messages: Sequence[Message], tools: Tools, names: tuple[str, ...]) -> Hashable | None:
        """Return everything that a rendering depends on, except the content of its only message.

        None: there is more than one message, or the content cannot be filled in.
        """
        if len(messages) != 1 or type(messages[0]["content"]) is not str or self._rendering.has_marks(messages, tools):
            return None

        others = tuple([(key, value) for key, value in messages[0].items() if key != "content"])
        for _, value in others:
            if type(value) is not str:
                return None
        return names, others, self._rendering.schemas_key(tools)

    def _is_separator(self, ids: tuple[int, ...]) -> bool:
        """Whether the ids are white space; the one or two separators of a template are cached."""
        if ids in self._separators:
            return True
        if self._encoder.decode(ids).strip():
            return False
        self._separators.add(ids)
        return True

    def _history(self, messages: Sequence[Message], names: tuple[str, ...]) -> list[Message]:
        """Return a question and the turn before the new messages.

        The turn has calls if the messages begin with results, else it is an answer. It is also an
        answer if the template omits calls: then it shows only the model's text.
        """
        if not names or not self._shows_calls(1):
            return [user(QUESTION), assistant(ANSWER)]

        ids = tuple(
            str(message.get("tool_call_id") or f"probe{i:04d}") for i, message in enumerate(messages[: len(names)])
        )
        known = self._histories.get((names, ids))
        if known is None:
            if len(self._histories) >= MOST_HISTORIES:  # the models make up an id for every call
                self._histories.clear()

            # Some templates write only one call a turn.
            shown = names if self._shows_calls(len(names)) else names[:1]
            known = [user(QUESTION), calling(shown, [self._rendering.harmless(call_id) for call_id in ids])]
            self._histories[names, ids] = known
        return known

    def _shows_calls(self, count: int) -> bool:
        """Whether the template writes a turn with `count` calls."""
        if count not in self._shown_calls:
            message = calling([TOOL] * count, [f"probe{i:04d}" for i in range(count)])
            try:
                text = self._template.render([user(QUESTION), message], None, generate=False)
            except ModelError:
                text = ""
            self._shown_calls[count] = all(f"{VALUE}-{i:04d}" in text for i in range(count))
        return self._shown_calls[count]

    def takes_call_id(self, call_id: str) -> bool:
        """Whether the template renders a call with this id; some refuse ids of another length."""
        shown = self._rendering.harmless(call_id)
        answer: Message = {"role": "tool", "name": TOOL, "tool_call_id": shown, "content": "x"}
        return self._rendering.renders([user(QUESTION), calling([TOOL], [shown]), answer])

    @cached_property
    def names_matter(self) -> bool:
        """Whether the template writes the called tool's name after the turn."""
        if not self._shows_calls(1):
            return False

        def text_after_call_of(name: str) -> str:
            history = [user(QUESTION), calling([name], [CALL_ID])]
            new: Message = {"role": "tool", "tool_call_id": CALL_ID, "content": "x"}
            text = self._template.render([*history, new], None, generate=True)
            return text[end_of_words(text, history) :]

        return text_after_call_of(TOOL) != text_after_call_of("probe_other_tool")

    def _start_of_continuation(self, text: str, history: list[Message], end: TurnEnd) -> int:
        """Return where a continuation begins in a rendering that begins with `history`."""
        words = end_of_words(text, history)
        if end.closer is None:
            return words + len(end.tail)
        if not is_call(history):
            return words  # everything that closes an answer

        # After a call's last words the call itself must be closed, which the model does.
        controls = self._encoder.pattern.finditer(text, words)
        return [next(controls) for _ in range(end.nth)][-1].start()

    def _turn_end(self, history: list[Message], tools: Tools) -> TurnEnd:
        """Return how the template ends the last turn of `history`."""
        calls = len(history[-1].get("tool_calls", ()))
        key = (calls, self._rendering.schemas_key(tools))
        if key not in self._ends:
            self._ends[key] = self._find_turn_end(history, tools)
        return self._ends[key]

    def _find_turn_end(self, history: list[Message], tools: Tools) -> TurnEnd:
        render = self._template.render
        alone, prompted = render(history, tools, generate=False), render(history, tools, generate=True)
        words = end_of_words(alone, history)

        follow: Message = user(QUESTION)
        if is_call(history):
            call = history[-1]["tool_calls"][0]
            name = call["function"]["name"]
            follow = {"role": "tool", "name": name, "tool_call_id": call.get("id", ""), "content": "x"}
        followed = render([*history, follow], tools, generate=True)
        prompted_end = prompted[end_of_words(prompted, history) :]

        if alone == prompted:  # the template has no generation prompt, or always writes it
            alone = without_generation_prompt(alone, render(history[:1], tools, generate=False))

        return find_turn_end(
            self._encoder,
            alone=alone[words:],
            prompted=prompted_end,
            followed=followed[end_of_words(followed, history) :],
            answer=self._turn_end([user(QUESTION), assistant(ANSWER)], tools) if is_call(history) else None,
        )

    def _opening_after(self, history: list[Message], message: Message, end: TurnEnd) -> int:
        """Return the id of the first control token after the turn."""
        text = self._template.render([*history, message], None, generate=True)
        opening = self._encoder.find_control(text, end_of_words(text, history) + len(end.tail))
        assert opening is not None  # find_turn_end has found it
        return self._encoder.added[opening.group()]

    # -- refused templates

    def _check_appends(
        self, history: list[Message], messages: Sequence[Message], tools: Tools, end: TurnEnd
    ) -> tuple[bool, bool]:
        """Refuse a template that changes or counts earlier turns, or omits a new message.

        Changes within the answer, such as dropped reasoning, are allowed: the sampled ids stay.

        Returns:
            Whether the template moves a system message (which matters only to conversations that
            have one), and whether the text after the turn depends on the tools.

        Raises:
            ModelError: the template does not only append.
        """
        roles = tuple(message["role"] for message in messages)
        known = (roles, self._rendering.schemas_key(tools), len(history[-1].get("tool_calls", ())))
        if known in self._can_append:
            return self._can_append[known]

        contents = [f"PROBE-CONTENT-{i}-" for i in range(len(messages))]
        new: list[Message] = [
            {**message, "content": content} for message, content in zip(messages, contents, strict=True)
        ]
        render = self._template.render
        after = render([*history, *new], tools, generate=True)
        appended = after[self._start_of_continuation(after, history, end) :]

        # 1. The template must render every message.
        for message, content in zip(messages, contents, strict=True):
            if content not in appended:
                raise ModelError(
                    f"the chat template leaves out a message of role {message['role']} after an assistant turn",
                    "set model.chat_template to one that renders it"
                    + (", or model.tool_role to user" if message["role"] == "tool" else ""),
                )

        # 2. The first prompt must stay as the model saw it.
        if not self._keeps([], [*history, *new], tools):
            raise not_append_only("earlier turns", messages)

        # 3. More turns before the probe must not change what follows it.
        longer = self._longer(history)
        if longer is not None:
            later = render([*longer, *history, *new], tools, generate=True)
            later = later[later.rfind(QUESTION, 0, later.rfind(contents[0]) if contents else None) :]
            if later[self._start_of_continuation(later, history, end) :] != appended:
                raise ModelError(
                    "the text that the chat template writes after a turn depends on the turns before it (it may count "
                    "calls, for instance), so it cannot be appended",
                    "set model.chat_template to one whose text after a turn does not",
                )

        moves_system = not self.keeps_system([*history, *new], tools)
        without = render([*history, *new], None, generate=True)
        tools_matter = without[self._start_of_continuation(without, history, end) :] != appended
        self._can_append[known] = moves_system, tools_matter
        return moves_system, tools_matter

    def keeps_system(self, conversation: list[Message], tools: Tools = None) -> bool:
        """Whether a system message before this conversation stays where the first prompt put it."""
        system: Message = {"role": "system", "content": "PROBE-SYSTEM"}
        if not self._rendering.renders([system, *conversation[:1]], tools):
            return True  # the template does not accept a system message
        return self._keeps([system], conversation, tools)

    def _keeps(self, begin: list[Message], conversation: list[Message], tools: Tools) -> bool:
        """Whether the conversation still begins with the first prompt, up to its question's end."""
        prompt = self._template.render([*begin, conversation[0]], tools, generate=True)
        later = self._template.render([*begin, *conversation], tools, generate=True)
        end = prompt.find(str(conversation[0]["content"])) + len(conversation[0]["content"])
        return prompt[:end] == later[:end]

    def _longer(self, history: list[Message]) -> list[Message] | None:
        """Return turns to put before `history`, to expose a template that counts turns.

        None: the template cannot render them.
        """
        earlier: list[Message] = [user("EARLIER-QUESTION")]
        if is_call(history):
            answer: Message = {"role": "tool", "name": TOOL, "tool_call_id": "probe9999", "content": "y"}
            earlier += [calling([TOOL], ["probe9999"], "EARLIER"), answer]
        earlier.append(assistant("EARLIER-ANSWER"))
        return earlier if self._rendering.renders([*earlier, *history]) else None


def not_append_only(what: str, messages: Sequence[Message]) -> ModelError:
    """Return the error for a template that changes `what` when these messages are added."""
    roles = ", ".join(message["role"] for message in messages)
    return ModelError(
        f"the chat template changes {what} when messages of the roles [{roles}] are added, but the model has already "
        "been shown them",
        "set model.chat_template to one that only appends",
    )
