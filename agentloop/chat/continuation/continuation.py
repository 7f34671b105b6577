"""What a template writes behind an assistant's turn, found by rendering it behind a turn that is known.

The text behind a known answer is the template's own, whatever the real history is, so nothing here depends on its
length. For that to be true the template may only append: one that changes earlier turns, counts them or leaves messages
out is refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from agentloop.chat.continuation.copied_text import TemplateTextCache
from agentloop.chat.continuation.turn_end import TurnEnd, find_turn_end, without_generation_prompt
from agentloop.chat.rendering import Rendering
from agentloop.chat.template import Fixed, Tools
from agentloop.errors import ModelError
from agentloop.types import Message

QUESTION, ANSWER, VALUE = "PROBE-QUESTION", "PROBE-ANSWER", "PROBE-VALUE"
TOOL, CALL_ID = "probe_tool", "probe0000"

MOST_HISTORIES = 1024
"""Turns with calls, by the names and ids in them, that are kept to be rendered again."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """What the template writes behind a sampled turn, up to and including the generation prompt.

    Attributes:
        ids: all of it.
        closed: `ids[:closed]` ends the turn; 0: nothing ends one, and `ids[0]` opens the next.
        lead: `ids[:lead]` may stand in the trajectory already: what ends the turn and the separator behind it, or the
            opening token.
        moves_system: the template writes a system message elsewhere once these messages follow.
    """

    ids: array[int]
    closed: int
    lead: int
    moves_system: bool = False


class Continuations:
    """The continuations of one template."""

    def __init__(self, rendering: Rendering) -> None:
        self._rendering = rendering
        self._template = rendering.template
        self._encoder = rendering.encoder
        self._ends: dict[tuple[int, int], TurnEnd] = {}
        self._can_append: dict[tuple[Any, ...], tuple[bool, bool]] = {}
        self._shown_calls: dict[int, bool] = {}
        self._histories: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Message]] = {}
        self._places: dict[Hashable, tuple[int, int, bool]] = {}
        self._slots = TemplateTextCache(self._template.strings())
        self._separators: set[tuple[int, ...]] = set()

    @cached_property
    def answer_end(self) -> TurnEnd:
        """How a plain answer ends.

        Raises:
            ModelError: in no token.
        """
        return self._turn_end([user(QUESTION), assistant(ANSWER)], None)

    @cached_property
    def call_end(self) -> TurnEnd | None:
        """How a turn with a call ends; None: the template has no calls, or no results of them."""
        try:
            return self._turn_end([user(QUESTION), calling([TOOL], [CALL_ID])], None)
        except ModelError:
            return None

    @cached_property
    def openings(self) -> dict[bool, int]:
        """Where nothing ends a turn: the token that opens the next one, behind a turn with calls (True) and without."""
        if self.answer_end.closer is not None:
            return {}
        opening = self._opening_after([user(QUESTION), assistant(ANSWER)], user("x"), self.answer_end)
        if self.call_end is None:
            return {False: opening, True: opening}
        history = [user(QUESTION), calling([TOOL], [CALL_ID])]
        return {False: opening, True: self._opening_after(history, result("x"), self.call_end)}

    def find(self, messages: Sequence[Message], tools: Tools, names: tuple[str, ...]) -> Continuation:
        """Render the messages behind a probe and cut off what comes before the probe's end."""
        shape = self._shape(messages, tools, names)
        text = None
        if shape is not None:
            text = self._slots.fill(shape, messages[0], lambda changed: self._render([changed], tools, names))
            if text is not None and shape in self._places:
                return Continuation(array("i", self._encoder.encode(text)), *self._places[shape])
        history, end, moves_system, _ = self._context(messages, tools, names)
        ids = (
            self._encoder.encode(text)
            if text is not None
            else self._rendering.encode(messages, tools, lambda m, t: self._render(m, t, names))
        )
        controls = self._encoder.ids
        count = 1 if end.closer is None or is_call(history) else end.nth
        position = -1
        for _ in range(count):
            position = next(i for i in range(position + 1, len(ids)) if ids[i] in controls)
        if end.closer is None:
            closed, following, lead = 0, position, position + 1
        else:
            closed = position + 1
            following = next((i for i in range(closed, len(ids)) if ids[i] in controls), closed)
            lead = following if self._is_separator(tuple(ids[closed:following])) else closed
        if text is not None and following < len(self._encoder.encode(self._slots.before(shape))):
            if len(self._places) >= MOST_HISTORIES:
                self._places.clear()
            self._places[shape] = closed, lead, moves_system  # all of it stands before the content
        return Continuation(array("i", ids), closed, lead, moves_system)

    def _context(
        self, messages: Sequence[Message], tools: Tools, names: tuple[str, ...]
    ) -> tuple[list[Message], TurnEnd, bool, Tools]:
        """What is rendered before the messages, how its turn ends, whether the template moves a system message, and the
        tools, where they matter behind the turn.
        """
        history = self._history(messages, names)
        end = self._turn_end(history, tools)
        moves_system, tools_matter = self._check_appends(history, messages, tools, end)
        # The schemas stand before the turn alone, most often: they are not rendered again then.
        return history, end, moves_system, tools if tools_matter else None

    def _render(self, messages: Sequence[Message], tools: Tools, names: tuple[str, ...]) -> str:
        history, end, _, tools = self._context(messages, tools, names)
        text = self._template.render([*history, *messages], tools, generate=True)
        return text[self._start_of_continuation(text, history, end) :]

    def _shape(self, messages: Sequence[Message], tools: Tools, names: tuple[str, ...]) -> Hashable | None:
        """All that a rendering depends on but for the content of a single message; None: it may not be filled in."""
        if len(messages) != 1 or type(messages[0]["content"]) is not str or self._rendering.has_marks(messages, tools):
            return None
        others = tuple([(key, value) for key, value in messages[0].items() if key != "content"])
        for _, value in others:
            if type(value) is not str:
                return None
        return names, others, self._rendering.schemas_key(tools)

    def _is_separator(self, ids: tuple[int, ...]) -> bool:
        """Whether they are white space. One or two separators are all that a template has."""
        if ids in self._separators:
            return True
        if self._encoder.decode(ids).strip():
            return False
        self._separators.add(ids)
        return True

    def _history(self, messages: Sequence[Message], names: tuple[str, ...]) -> list[Message]:
        """A question and the turn before the new messages: one with calls when results come first, else an answer.

        An answer too where the template leaves calls out: then the model's own text is all that it knows of them.
        """
        if not names or not self._shows_calls(1):
            return [user(QUESTION), assistant(ANSWER)]
        ids = tuple(
            str(message.get("tool_call_id") or f"probe{i:04d}") for i, message in enumerate(messages[: len(names)])
        )
        known = self._histories.get((names, ids))
        if known is None:
            if len(self._histories) >= MOST_HISTORIES:  # ids that the models made up
                self._histories.clear()
            shown = names if self._shows_calls(len(names)) else names[:1]  # a template of one call a turn
            known = [user(QUESTION), calling(shown, [self._rendering.harmless(call_id) for call_id in ids])]
            self._histories[names, ids] = known
        return known

    def _shows_calls(self, count: int) -> bool:
        """Whether the template writes a turn with so many calls."""
        if count not in self._shown_calls:
            message = calling(["probe_tool"] * count, [f"probe{i:04d}" for i in range(count)])
            try:
                text = self._template.render([user(QUESTION), message], None, generate=False)
            except ModelError:
                text = ""
            self._shown_calls[count] = all(f"{VALUE}-{i:04d}" in text for i in range(count))
        return self._shown_calls[count]

    def takes_call_id(self, call_id: str) -> bool:
        """Whether the template renders a call and its result with this id; some raise, for one of another length."""
        shown = self._rendering.harmless(call_id)
        result: Message = {"role": "tool", "name": TOOL, "tool_call_id": shown, "content": "x"}
        return self._rendering.renders([user(QUESTION), calling([TOOL], [shown]), result])

    @cached_property
    def names_matter(self) -> bool:
        """Whether the template writes the called tool's name behind the turn."""
        if not self._shows_calls(1):
            return False

        def behind(name: str) -> str:
            history = [user(QUESTION), calling([name], ["probe0000"])]
            new: Message = {"role": "tool", "tool_call_id": "probe0000", "content": "x"}
            text = self._template.render([*history, new], None, generate=True)
            return text[self._words(text, history) :]

        return behind("probe_tool") != behind("probe_other_tool")

    def _start_of_continuation(self, text: str, history: list[Message], end: TurnEnd) -> int:
        """Where, in a rendering that begins with `history`, the template's own text behind the turn begins."""
        words = self._words(text, history)
        if end.closer is None:
            return words + len(end.tail)
        if not is_call(history):
            return words  # what closes an answer, whole
        # Behind a call's last words the call itself has to be closed, which is the model's part.
        controls = self._encoder.pattern.finditer(text, words)
        return [next(controls) for _ in range(end.nth)][-1].start()

    def _words(self, text: str, history: list[Message]) -> int:
        """Where the last known words of the probe's turn end."""
        position = max(text.find(QUESTION), 0)
        if not is_call(history):
            found = text.find(ANSWER, position)
            if found < 0:
                raise _not_rendered("an assistant's answer", text)
            return found + len(ANSWER)
        found = text.find(f"{VALUE}-{len(history[-1]['tool_calls']) - 1:04d}", position)
        if found < 0:
            raise _not_rendered("a tool call", text)
        return found + len(VALUE) + 5

    def _turn_end(self, history: list[Message], tools: Tools) -> TurnEnd:
        """How the template ends the last turn of `history`."""
        calls = len(history[-1].get("tool_calls", ()))
        key = (calls, self._rendering.schemas_key(tools))
        if key not in self._ends:
            render = self._template.render
            alone, prompted = render(history, tools, generate=False), render(history, tools, generate=True)
            words = self._words(alone, history)
            follow: Message = user(QUESTION)
            if calls:
                call = history[-1]["tool_calls"][0]
                name = call["function"]["name"]
                follow = {"role": "tool", "name": name, "tool_call_id": call.get("id", ""), "content": "x"}
            followed = render([*history, follow], tools, generate=True)
            prompted_end = prompted[self._words(prompted, history) :]
            if alone == prompted:  # it has no generation prompt, or writes one always
                alone = without_generation_prompt(alone, render(history[:1], tools, generate=False))
            self._ends[key] = find_turn_end(
                self._encoder,
                alone=alone[words:],
                prompted=prompted_end,
                followed=followed[self._words(followed, history) :],
                answer=self._turn_end([user(QUESTION), assistant(ANSWER)], tools) if calls else None,
            )
        return self._ends[key]

    def _opening_after(self, history: list[Message], message: Message, end: TurnEnd) -> int:
        text = self._template.render([*history, message], None, generate=True)
        opening = self._encoder.find_control(text, self._words(text, history) + len(end.tail))
        assert opening is not None  # find_turn_end has seen it
        return self._encoder.added[opening.group()]

    # -- what is refused ---------------------------------------------------------------------------------------------

    def _check_appends(
        self, history: list[Message], messages: Sequence[Message], tools: Tools, end: TurnEnd
    ) -> tuple[bool, bool]:
        """Refuse a template that changes or counts what came before, or that leaves a new message out.

        What it changes inside of the answer, such as reasoning that it drops, stays as it was sampled.

        Returns:
            Whether the template moves a system message, which matters only to conversations that have one; and whether
            what it writes behind the turn depends on the tools.
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
        behind = after[self._start_of_continuation(after, history, end) :]
        for message, content in zip(messages, contents, strict=True):
            if content not in behind:
                raise ModelError(
                    f"the chat template leaves out a message of role {message['role']} after an assistant turn",
                    "set model.chat_template to one that renders it"
                    + (", or model.tool_role to user" if message["role"] == "tool" else ""),
                )
        if not self._keeps([], [*history, *new], tools):
            raise changes("earlier turns", messages)
        longer = self._longer(history)
        if longer is not None:
            later = render([*longer, *history, *new], tools, generate=True)
            later = later[later.rfind(QUESTION, 0, later.rfind(contents[0]) if contents else None) :]
            if later[self._start_of_continuation(later, history, end) :] != behind:
                raise ModelError(
                    "what the chat template writes after a turn depends on the turns before it (a count of calls, for "
                    "instance), so it cannot be appended",
                    "set model.chat_template to one that does not",
                )
        moves_system = not self.keeps_system([*history, *new], tools)
        without = render([*history, *new], None, generate=True)
        tools_matter = without[self._start_of_continuation(without, history, end) :] != behind
        self._can_append[known] = moves_system, tools_matter
        return moves_system, tools_matter

    def keeps_system(self, conversation: list[Message], tools: Tools = None) -> bool:
        """Whether a system message before this conversation stays where the first prompt showed it."""
        system: Message = {"role": "system", "content": "PROBE-SYSTEM"}
        if not self._rendering.renders([system, *conversation[:1]], tools):
            return True  # the template takes no system message at all
        return self._keeps([system], conversation, tools)

    def _keeps(self, begin: list[Message], conversation: list[Message], tools: Tools) -> bool:
        """Whether the first prompt, up to the end of its question, is still the same when the conversation goes on."""
        prompt = self._template.render([*begin, conversation[0]], tools, generate=True)
        later = self._template.render([*begin, *conversation], tools, generate=True)
        end = prompt.find(str(conversation[0]["content"])) + len(conversation[0]["content"])
        return prompt[:end] == later[:end]

    def _longer(self, history: list[Message]) -> list[Message] | None:
        """Turns to put before `history`, so that what counts them shows; None when the template cannot render them."""
        earlier: list[Message] = [user("EARLIER-QUESTION")]
        if is_call(history):
            result: Message = {"role": "tool", "name": "probe_tool", "tool_call_id": "probe9999", "content": "y"}
            earlier += [calling(["probe_tool"], ["probe9999"], "EARLIER"), result]
        earlier.append(assistant("EARLIER-ANSWER"))
        return earlier if self._rendering.renders([*earlier, *history]) else None


def changes(what: str, messages: Sequence[Message]) -> ModelError:
    roles = ", ".join(message["role"] for message in messages)
    return ModelError(
        f"the chat template changes {what} when messages of the roles [{roles}] are added: what the model was shown "
        "cannot stay",
        "set model.chat_template to one that only appends",
    )


def _not_rendered(what: str, text: str) -> ModelError:
    return ModelError(
        f"the chat template does not render {what}: {text[-200:]!r}", "set model.chat_template to one that does"
    )


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def calling(names: Sequence[str], ids: Sequence[str], value: str = VALUE) -> Message:
    """A turn with a call of each name; its argument tells which one it is."""
    message = assistant("")
    message["tool_calls"] = [
        {
            "type": "function",
            "id": call_id,
            "function": {"name": name, "arguments": Fixed(argument=f"{value}-{i:04d}")},
        }
        for i, (name, call_id) in enumerate(zip(names, ids, strict=False))
    ]
    return message


def is_call(history: list[Message]) -> bool:
    return "tool_calls" in history[-1]


def result(text: str) -> Message:
    """The result of the probe's call."""
    return {"role": "tool", "name": TOOL, "tool_call_id": CALL_ID, "content": text}
