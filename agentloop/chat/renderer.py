"""`ChatRenderer`: from messages to ids and back. Sampled tokens are never rendered again.

The prompt of turn k+1 is the trajectory so far plus `extend(...)`. To find what to append, `extend`
renders a short known conversation, a question and an answer, followed by the new messages: the
template wrote the text after the answer, whatever the real history is. So the cost does not grow
with the history. With the ChatML template, for one tool message:

    rendered   ...<|im_start|>assistant\\nANSWER<|im_end|>\\n<|im_start|>user\\n...
    appended                                    ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^

A template that does not work this way, because it changes or counts earlier turns, is refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from agentloop.chat.continuation.continuation import Continuation, Continuations, not_append_only
from agentloop.chat.continuation.probe import QUESTION, TOOL, VALUE, assistant, result, user
from agentloop.chat.continuation.tool_images import fold_tool_images, has_tool_images, shows_tool_images
from agentloop.chat.continuation.tool_role import emulate_tool_role
from agentloop.chat.formats import ToolFormat, find_format, known_formats, load_format, reasoning_openings
from agentloop.chat.images import ImageTokens
from agentloop.chat.rendering import MARK, Rendering
from agentloop.chat.sampled import SampledText
from agentloop.chat.template import Template, Tools
from agentloop.chat.tokenizer import SafeEncoder
from agentloop.errors import ModelError
from agentloop.types import Message, ParsedTurn, StopReason

REMEMBERED = 1024
"""Largest number of renderings whose ids are cached."""

REMEMBERED_CHARACTERS = 32_000
"""Renderings of longer messages are not cached."""

REASONING_OPENINGS = reasoning_openings()
"""If a generation prompt ends in one of these, the model's turn begins with reasoning."""


class ChatRenderer:
    """Renders messages with a chat template and reads sampled turns.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        chat_template: Jinja text that replaces the tokenizer's own.
        tool_format: name of the tool-call format; None: find it by rendering calls and reading them
            back.
        chat_template_kwargs: further variables of the template, such as `{"enable_thinking":
            False}`.
        tool_role: how tool results are shown. `tool`: as the template's own tool messages. `user`:
            as user messages, for a template that has no tool messages; the system message describes
            the tools, or the first user message if the template has no system messages either.
        images: how images count in tokens; None: messages contain no images.

    Attributes:
        end_of_turn: id of the token that ends an assistant's turn within a conversation; None if no
            token does (GLM).
        closing_ids: ids that end a turn anywhere in a conversation: `<|im_end|>`; for gpt-oss
            `<|end|>`, `<|return|>` and `<|call|>`.
        stop_token_ids: ids after which an engine should stop.
        image_token: placeholder of images; None: messages contain no images.
        opens_reasoning: whether the generation prompt opens a block of reasoning.
        tool_format: reads the model's calls.
        unread_call: a call as the template renders it, if no known format reads it back; else None.

    Raises:
        ModelError: there is no chat template, or its turns do not end in a token.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        tool_format: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tool_role: str = "tool",
        images: ImageTokens | None = None,
    ) -> None:
        if tool_role not in ("tool", "user"):
            raise ModelError(f"model.tool_role {tool_role!r} is not known", "use one of: tool, user")

        self.tokenizer = tokenizer
        self.template = Template(tokenizer, chat_template, chat_template_kwargs or {})
        self.encoder = SafeEncoder(tokenizer)
        self._rendering = Rendering(self.template, self.encoder, images)
        self.image_token = None if images is None else images.placeholder
        self._continuations = Continuations(self._rendering)
        self._emulates_tool_role = tool_role == "user"
        self._remembered: dict[str, Any] = {}
        self._system_shown = False

        # Where turns end, and where an engine should therefore stop.
        answer = self._continuations.answer_end
        call = None if self._emulates_tool_role else self._continuations.call_end
        ends = [end for end in (answer, call) if end is not None]
        added = self.encoder.added
        self.end_of_turn: int | None = added[answer.closer] if answer.closer else None
        self.closing_ids = frozenset(added[token] for end in ends for token in (end.closer, end.final) if token)
        finals = {added[end.final] for end in ends if end.final}
        self.stop_token_ids: list[int] = sorted(finals | set(self._continuations.openings.values()))
        special = {tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
        self._stop_ids = frozenset(self.stop_token_ids) | self.closing_ids | special

        self.opens_reasoning = self._generation_prompt().rstrip().endswith(REASONING_OPENINGS)
        self.unread_call: str | None = None
        self.tool_format: ToolFormat = load_format(tool_format) if tool_format else self._find_format()

    def start(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Return the ids of a conversation's start, up to and including the generation prompt."""

        def build(messages: Sequence[Message], tools: Tools) -> array[int]:
            return array(
                "i", self._rendering.encode(messages, tools, lambda m, t: self.template.render(m, t, generate=True))
            )

        messages, tools = self._shown(messages, tools)
        self._system_shown |= bool(messages) and messages[0]["role"] == "system"

        ids: array[int] = self._memo(f"start{self._rendering.schemas_key(tools)}{messages!r}", build, messages, tools)
        return ids.tolist()

    def extend(
        self,
        token_ids: Sequence[int],
        stop_reason: StopReason | str,
        messages: Sequence[Message],
        tools: Tools = None,
    ) -> list[int]:
        """Return the ids to append, so that the model can continue after the new `messages`.

        They begin with the missing part of the sampled turn's end: the end-of-turn token after a
        `length` stop, and the separator that the template puts after that token. Tokens that the
        model has sampled are not repeated, including the token that opens the next turn (GLM) or
        ends the last turn of a conversation (gpt-oss' `<|return|>`).

        Args:
            token_ids: the trajectory so far; it ends in a sampled turn.
            stop_reason: how that turn ended. Only the ids at the end of `token_ids` are evaluated.
            messages: only the new ones.
            tools: the schemas that were given to `start`. They are recognized by identity: do not
                change them in place.

        Raises:
            ModelError: the template cannot render these messages after an assistant turn.
        """
        tools = None if self._emulates_tool_role else tools
        messages, tools = self._shown(messages, tools)

        names = self._called_names(token_ids, messages)
        key = f"extend{self._rendering.schemas_key(tools)}{names}{messages!r}"
        found: Continuation = self._memo(key, lambda m, t: self._continuations.find(m, t, names), messages, tools)
        if found.moves_system and self._system_shown:
            raise not_append_only("the system message", messages)
        return found.ids[self._already_there(token_ids, found) :].tolist()

    def check(self, tools: Tools = None) -> None:
        """Refuse, before a run starts, a template that cannot continue after a turn (token law,
        rule 6).

        Args:
            tools: the schemas that the run offers. With them the template must render tool results,
                else a user message.

        Raises:
            ModelError: what the template cannot do.
        """
        if tools and self.unread_call is not None:
            raise ModelError(
                f"no known format can read the template's tool call: {self.unread_call!r}",
                f"set model.tool_format to one of {', '.join(sorted(known_formats()))}, or model.chat_template to a "
                "matching one",
            )
        self.start([user(QUESTION)], tools)
        self.extend([], StopReason.STOP, [result("x") if tools else user("x")], tools)

    def parse(self, sampled_ids: Sequence[int], tools: Tools = None) -> ParsedTurn:
        """Read one sampled turn. The tokens that ended it are left out; invalid UTF-8 becomes
        U+FFFD.

        Args:
            sampled_ids: as the engine returned them.
            tools: schemas, for formats that write arguments without types.
        """
        end = len(sampled_ids)
        while end and sampled_ids[end - 1] in self._stop_ids:
            end -= 1

        turn = self._rendering.text_of(list(sampled_ids[:end]))
        return self.tool_format.parse(turn, list(tools) if tools else None, reasoning_open=self.opens_reasoning)

    def call_id(self, sampled: str, turn: int, number: int) -> str:
        """Return the id of a call: the model's own if the template takes it, else nine letters and
        digits.

        Args:
            sampled: the id that `parse` found; empty if the model wrote none.
            turn, number: place of the call in the episode, which makes the id unique there.
        """
        if sampled and self._continuations.takes_call_id(sampled):
            return sampled
        return f"c{turn % 10_000:04d}{number % 10_000:04d}"

    def whole(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Return the ids of a whole conversation with the generation prompt, rendered in one piece.

        Episodes are checked against it and never built from it, because it renders sampled turns
        again.
        """
        messages, tools = self._shown(messages, tools)
        return self._rendering.encode(messages, tools, lambda m, t: self.template.render(m, t, generate=True))

    def turn_ids(self, message: Message, *, cut: bool = False) -> list[int]:
        """Return the ids of an assistant's message as a model would sample it, as the answer to a
        question.

        After a longer history a template may write earlier turns differently.

        Args:
            message: the assistant's message.
            cut: leave out the token that ends the turn.

        Raises:
            ModelError: the template cannot render it.
        """
        emulated = self._emulated([message])[0] if self._emulates_tool_role else message
        text = self._rendering.protected([emulated], None, lambda m, _: self._turn_text(m[0]))
        ids = self.encoder.encode_protected(text, MARK)

        end = max((i for i, token in enumerate(ids) if token in self.stop_token_ids), default=None)
        if end is not None:
            return ids[:end] if cut else ids[: end + 1]
        if cut or not self.stop_token_ids:
            return ids

        # No token ends a turn: the model stops by opening the next one.
        is_call = bool(message.get("tool_calls"))
        return [*ids, self._continuations.openings[is_call]]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens included."""
        return self.encoder.decode(ids)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of content, with control tokens read as plain text."""
        return self.encoder.encode_plain(text)

    def first_prompt(self, messages: Sequence[Message], tools: Tools = None) -> str:
        """Return the text of a conversation's start, up to and including the generation prompt."""
        messages, tools = self._shown(messages, tools)
        return self.template.render(messages, tools, generate=True)

    def keeps_system(self, conversation: list[Message], tools: Tools = None) -> bool:
        """Whether a system message before this conversation stays where the first prompt put it."""
        if self._emulates_tool_role:
            conversation, tools = self._emulated(conversation), None
        return self._continuations.keeps_system(conversation, tools)

    def shows_tools(self, tools: Tools) -> bool:
        """Whether the first prompt describes the tools to the model."""
        return self._emulates_tool_role or self.template.render(
            [user(QUESTION)], tools, generate=True
        ) != self.template.render([user(QUESTION)], None, generate=True)

    def _shown(self, messages: Sequence[Message], tools: Tools) -> tuple[Sequence[Message], Tools]:
        """Return messages and schemas in the roles in which the template shows them."""
        if self._emulates_tool_role:
            return self._emulated(messages, tools), None
        if has_tool_images(messages) and not self._tool_turns_show_images:
            messages = fold_tool_images(messages)
        return messages, tools

    @cached_property
    def _tool_turns_show_images(self) -> bool:
        """Whether the template writes a placeholder for an image in a tool's result."""
        if self.image_token is None:
            return True  # encoding refuses images, with its own reason
        return shows_tool_images(self.template, self.encoder.decode([self.image_token]))

    def _emulated(self, messages: Sequence[Message], tools: Tools = None) -> list[Message]:
        """Return messages for a template without a tool role."""
        return emulate_tool_role(messages, tools, system_role=self._has_system_role)

    @cached_property
    def _has_system_role(self) -> bool:
        """Whether the template writes a system message."""
        words = "PROBE-SYSTEM"
        try:
            text = self.template.render([{"role": "system", "content": words}, user(QUESTION)], None, generate=True)
        except ModelError:
            return False
        return words in text

    def _memo(self, key: str, build: Callable[..., Any], messages: Sequence[Message], tools: Tools) -> Any:
        """Return `build(messages, tools)`, cached by `key`: the samples of a group begin alike."""
        known = self._remembered.get(key)
        if known is None:
            known = build(messages, tools)
            if len(key) <= REMEMBERED_CHARACTERS:
                if len(self._remembered) >= REMEMBERED:
                    # Drop the oldest: groups come and go in order.
                    self._remembered.pop(next(iter(self._remembered)), None)  # a thread may render a long one
                self._remembered[key] = known
        return known

    def _called_names(self, token_ids: Sequence[int], messages: Sequence[Message]) -> tuple[str, ...]:
        """Return the names of the tools whose results lead the new messages.

        Some templates write them. A result without a name gets that of the call in the last turn.
        """
        names: list[str] = []
        unknown = False
        for message in messages:
            if message["role"] != "tool":
                break
            name = message.get("name")
            unknown |= not name
            names.append(self._rendering.harmless(str(name or TOOL)))

        # The last turn is parsed only if the template would show the name.
        if unknown and self._continuations.names_matter:
            called = [call.name for call in self.parse(self._last_turn(token_ids)).tool_calls]
            for i, message in enumerate(messages[: len(names)]):
                if not message.get("name"):
                    if not called:
                        raise ModelError(
                            "the chat template writes the name of the called tool beside its result, but the turn "
                            "before has no readable call",
                            'give the message a name: {"role": "tool", "name": ..., "content": ...}',
                        )
                    names[i] = self._rendering.harmless(called[min(i, len(called) - 1)])
        return tuple(names)

    def _already_there(self, token_ids: Sequence[int], found: Continuation) -> int:
        """Return how many ids of the continuation are at the end of the trajectory already."""
        if not token_ids:
            return 0

        # ids[key - 1] ends the turn, or opens the next one.
        ids, lead = found.ids, found.lead
        key = found.closed or lead

        # The longest match first: that token and a part of the separator after it.
        for end in range(lead, key, -1):
            if array("i", token_ids[key - end - 1 :]) == ids[key - 1 : end]:
                return end

        # That token alone, or another that ends turns.
        if token_ids[-1] == ids[key - 1] or (found.closed and token_ids[-1] in self.closing_ids):
            return key

        # A part of what the template writes before that token.
        for end in range(key - 1, 0, -1):
            if array("i", token_ids[-end:]) == ids[:end]:
                return end
        return 0

    def _last_turn(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Return the trajectory after its last generation prompt; searched from the end."""
        opening = self.generation_prompt_ids
        size = len(opening)
        for begin in range(len(token_ids) - size, -1, -1):
            if token_ids[begin] == opening[0] and list(token_ids[begin : begin + size]) == opening:
                return token_ids[begin + size :]
        return token_ids

    # -- the generation prompt and the format of calls

    @cached_property
    def generation_prompt_ids(self) -> list[int]:
        """The ids of the generation prompt."""
        return self.encoder.encode(self._generation_prompt())

    def _generation_prompt(self) -> str:
        """Return the text of the generation prompt; empty if the template has none."""
        without = self.template.render([user(QUESTION)], None, generate=False)
        prompted = self.template.render([user(QUESTION)], None, generate=True)
        if prompted.startswith(without) and len(prompted) > len(without):
            return prompted[len(without) :]
        return prompted[self._rendering.common_prefix(without, prompted) :]

    def _find_format(self) -> ToolFormat:
        """Return the format that reads back the calls which the template renders."""

        def turn_of(calls: Sequence[dict[str, Any]]) -> SampledText | None:
            message = assistant("")
            message["tool_calls"] = [
                {
                    "type": "function",
                    "id": f"probe{i:04d}",
                    "function": {"name": one["name"], "arguments": one["arguments"]},
                }
                for i, one in enumerate(calls)
            ]
            try:
                return self.rendered_turn(message)
            except ModelError:
                return None

        turn = turn_of([{"name": TOOL, "arguments": {"argument": VALUE}}])
        found = None
        if turn is not None and TOOL in turn.text and not self._emulates_tool_role:
            found = find_format(turn_of, None)
            if found is None:
                self.unread_call = turn.text

        # hermes returns the text of turns without calls unchanged.
        return found or load_format("hermes")

    def _turn_text(self, message: Message) -> str:
        """Return an assistant's message as the last of a conversation, without the prompt."""
        prompt = self.template.render([user(QUESTION)], None, generate=True)
        text = self.template.render([user(QUESTION), message], None, generate=False)
        return text[self._rendering.common_prefix(prompt, text) :]

    def begins_with_prompt(self, message: Message) -> bool:
        """Whether the template writes this message, at the end, after the generation prompt.

        With `enable_thinking: false` the prompt closes the reasoning, so a turn with reasoning does
        not follow it.
        """
        emulated = self._emulated([message])[0] if self._emulates_tool_role else message
        prompt = self.template.render([user(QUESTION)], None, generate=True)
        return self.template.render([user(QUESTION), emulated], None, generate=False).startswith(prompt)

    def rendered_turn(self, message: Message) -> SampledText:
        """Return an assistant's message at the end of a conversation: what a model would sample.

        Raises:
            ModelError: the template cannot render it.
        """
        turn = self._turn_text(self._emulated([message])[0] if self._emulates_tool_role else message)
        controls = {match.start(): match.group() for match in self.encoder.pattern.finditer(turn)}
        return SampledText(turn, controls, self.encoder.spellings)
