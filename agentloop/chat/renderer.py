"""`ChatRenderer`: from messages to ids and back, without ever rendering again what was sampled.

The prompt of turn k+1 is the trajectory so far plus `extend(...)`. What `extend` appends is found by rendering a short
dummy conversation, a question and an answer that are known, with the new messages after them: the text behind the
answer's end-of-turn token is the template's own, whatever the real history is. So its cost does not grow with the
history. With the ChatML template, for one tool message:

    rendered   <|im_start|>user\\nQUESTION<|im_end|>\\n<|im_start|>assistant\\nANSWER<|im_end|>\\n<|im_start|>user\\n...
    appended                                                                              ^^^^^^^^^^^^^^^^^^^^^^^^^
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from agentloop.chat.formats import FORMATS, ToolFormat, load_format
from agentloop.chat.sampled import SampledText
from agentloop.chat.tokenizer import SafeEncoder
from agentloop.errors import ModelError
from agentloop.types import Message, ParsedTurn, StopReason

REMEMBERED = 1024
REMEMBERED_CHARACTERS = 32_000
"""The ids of so many renderings are kept, of messages no longer than this."""

QUESTION, ANSWER = "PROBE-QUESTION", "PROBE-ANSWER"
CALL: dict[str, Any] = {"name": "probe_tool", "arguments": {"argument": "value"}}
MARK = "\ue0a7"
"""Stands around the number of a control token while its content is rendered; a private-use character."""


Tools = list[dict[str, Any]] | None
"""Tool schemas that the template shows the model."""


class ChatRenderer:
    """Renders messages with a chat template and reads sampled turns.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        chat_template: Jinja text that replaces the tokenizer's own.
        tool_format: name of the tool-call format; None: found by rendering a call and reading it back.

    Attributes:
        end_of_turn: id of the token that ends an assistant's turn.

    Raises:
        ModelError: there is no chat template, its turns have no end token, or its tool calls cannot be read back.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None, tool_format: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._template = chat_template or tokenizer.chat_template
        if not self._template:
            raise ModelError("the tokenizer has no chat template", "set model.chat_template to a Jinja file")
        self._encoder = SafeEncoder(tokenizer)
        self._remembered: dict[str, array[int]] = {}
        self._can_append: set[tuple[tuple[str, ...], str]] = set()
        self._end = self._find_end()
        self.end_of_turn: int = self._encoder.added[self._end]
        self._format = load_format(tool_format) if tool_format else self._find_format()
        self._stop_ids = {self.end_of_turn, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}

    def start(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Ids of a conversation's start, up to and including the generation prompt."""

        def render(messages: Sequence[Message], tools: Tools) -> str:
            return self._render(messages, tools, generate=True)

        return self._ids(f"start{messages!r}{tools!r}", messages, tools, render)

    def extend(
        self,
        token_ids: Sequence[int],
        stop_reason: StopReason | str,
        messages: Sequence[Message],
        tools: Tools = None,
    ) -> list[int]:
        """The ids to append so that the model can speak after the new `messages`.

        Args:
            token_ids: the trajectory so far; it ends in a sampled turn.
            stop_reason: how that turn ended; without its end-of-turn token, that token comes first.
            messages: only the new ones.

        Raises:
            ModelError: the template cannot render these messages after an assistant turn.
        """
        # The end-of-turn token is encoded along and then left out: what follows a token can be encoded another way than
        # what begins a text, and some such tokens take the white space behind them.

        def render(messages: Sequence[Message], _: None) -> str:
            return self._from_end_of_turn(messages, tools)

        ids = self._ids(f"extend{messages!r}{tools!r}", messages, None, render)
        assert ids[0] == self.end_of_turn
        return ids[1:] if token_ids and token_ids[-1] == self.end_of_turn else ids

    def check(self, tools: Tools = None) -> None:
        """Refuse, before a run starts, a template that cannot go on after a turn (DESIGN section 3, rule 6).

        Args:
            tools: the schemas that the run offers; with them, tool results have to be rendered, else a user's message.

        Raises:
            ModelError: what the template cannot do.
        """
        self.start([_user(QUESTION)], tools)
        self.extend([], StopReason.STOP, [{"role": "tool", "content": "x"} if tools else _user("x")], tools)

    def parse(self, sampled_ids: Sequence[int]) -> ParsedTurn:
        """Read one sampled turn; its end-of-turn token is left out, bytes that are no UTF-8 become U+FFFD."""
        ids = list(sampled_ids)
        while ids and ids[-1] in self._stop_ids:
            ids.pop()
        return self._format.parse(SampledText(self.decode(ids)))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens shown."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def encode_text(self, text: str) -> list[int]:
        """Ids of content, as plain text."""
        return self._encoder.encode_plain(text)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _ids(self, key: str, messages: Sequence[Message], tools: Tools, render: Callable[..., str]) -> list[int]:
        """Ids of what `render` makes of the messages. The samples of a group begin alike: repeats are remembered."""
        known = self._remembered.get(key)
        if known is not None:
            return known.tolist()
        ids = self._encode(messages, tools, render)
        if len(key) <= REMEMBERED_CHARACTERS:
            if len(self._remembered) >= REMEMBERED:
                del self._remembered[next(iter(self._remembered))]  # the oldest: groups come and go in order
            self._remembered[key] = array("i", ids)
        return ids

    def _encode(self, messages: Sequence[Message], tools: Tools, render: Callable[..., str]) -> list[int]:
        """Encode what `render` makes of the messages; control tokens in them and in the tools stay plain text."""
        if not any(self._encoder.has_control(text) or MARK in text for text in _texts([*messages, tools])):
            return self._encoder.encode(render(messages, tools))
        protected = [_separate_parts(_map_texts(message, self._protect)) for message in messages]
        return self._encoder.encode_protected(render(protected, _map_texts(tools, self._protect)), MARK)

    def _protect(self, text: str) -> str:
        return self._encoder.protect(text.replace(MARK, "\ufffd"), MARK)

    def _from_end_of_turn(self, messages: Sequence[Message], tools: Tools) -> str:
        """The template's text from an assistant turn's end token on, for these new messages."""
        roles = tuple(message["role"] for message in messages)
        history = [_user(QUESTION), _assistant(ANSWER, [CALL] if roles[:1] == ("tool",) else [])]
        text = self._render([*history, *messages], tools, generate=True)
        known = (roles, repr(tools))
        if known not in self._can_append:
            self._check_appends(history, messages, tools)
            self._can_append.add(known)
        return text[self._end_of_answer(text) :]

    def _check_appends(self, history: list[Message], messages: Sequence[Message], tools: Tools) -> None:
        """Refuse a template that changes what came before the answer when it goes on, or that leaves a message out.

        What it changes inside of the answer, such as reasoning that it drops, stays as it was sampled.
        """
        contents = [f"PROBE-CONTENT-{i}-" for i in range(len(messages))]
        new: list[Message] = [
            {**message, "content": content} for message, content in zip(messages, contents, strict=True)
        ]
        before = self._render(history, tools, generate=False)
        after = self._render([*history, *new], tools, generate=True)
        kept = before.find(QUESTION) + len(QUESTION)
        if before[:kept] != after[:kept]:
            raise ModelError(
                "the chat template changes earlier turns when messages are added: what was sampled cannot stay",
                "set model.chat_template to one that only appends",
            )
        self._end_of_answer(before)
        end = self._end_of_answer(after)
        for message, content in zip(messages, contents, strict=True):
            if content not in after[end:]:
                raise ModelError(
                    f"the chat template leaves out a message of role {message['role']} after an assistant turn",
                    "set model.chat_template to one that renders it",
                )

    def _end_of_answer(self, text: str) -> int:
        """Where the end-of-turn token of the probe's answer stands in a rendering."""
        question = text.find(QUESTION)
        answer = max(text.find(ANSWER, question), text.find(CALL["name"], question))
        end = text.find(self._end, answer)
        if question < 0 or answer < 0 or end < 0:
            raise ModelError(
                f"the chat template does not end every assistant turn with {self._end}: {text[max(question, 0) :]!r}",
                "set model.chat_template to one that does",
            )
        return end

    def _find_end(self) -> str:
        """The token that ends an assistant's turn: the first control token after what it said."""
        text = self._render([_user(QUESTION), _assistant(ANSWER)], None, generate=False)
        answer = text.rfind(ANSWER)
        tail = text[answer + len(ANSWER) :] if answer >= 0 else text
        end = self._encoder.find_control(tail)
        if answer < 0 or end is None or tail[: end.start()].strip():
            raise ModelError(
                f"the chat template ends an assistant turn with {tail!r}, which holds no end-of-turn token",
                "use a template whose turns end in an added token such as <|im_end|>",
            )
        return end.group()

    def _render(self, messages: Sequence[Message], tools: Tools, *, generate: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=tools or None,
                    chat_template=self._template,
                    add_generation_prompt=generate,
                    tokenize=False,
                )
            )
        except (TemplateError, TypeError, KeyError, ValueError) as exc:
            roles = ", ".join(message["role"] for message in messages)
            raise ModelError(
                f"the chat template cannot render the roles [{roles}]: {exc}",
                "change the rows' prompt, or set model.chat_template to one that can",
            ) from exc

    def _find_format(self) -> ToolFormat:
        """The format that reads back a call which the template rendered."""
        try:
            text = self._render([_user(QUESTION), _assistant("", [CALL])], None, generate=False)
        except ModelError:
            text = QUESTION  # a template without tool calls
        turn = text[text.rindex(QUESTION) + len(QUESTION) :]
        for candidate in FORMATS.values():
            parsed = candidate.parse(SampledText(turn))
            if [(call.name, call.arguments) for call in parsed.tool_calls] == [(CALL["name"], CALL["arguments"])]:
                return candidate
        if CALL["name"] in turn:
            known = ", ".join(sorted(FORMATS))
            raise ModelError(
                f"no known format reads the template's tool call back: {turn!r}",
                f"set model.tool_format to one of {known}, or model.chat_template to a matching one",
            )
        return FORMATS["hermes"]  # it reads turns without calls as they are


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str, calls: Sequence[dict[str, Any]] = ()) -> Message:
    message: Message = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]  # type: ignore[typeddict-item]
    return message


def _texts(value: Any) -> Iterator[str]:
    """Every string in a message, however deep: contents, reasoning, names, arguments. Parts also as one text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
        parts = [item["text"] for item in value if isinstance(item, dict) and isinstance(item.get("text"), str)]
        if len(parts) > 1:  # a template may write them one behind the other
            yield "".join(parts)


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
