"""`ChatRenderer`: from messages to ids and back, without ever rendering again what was sampled.

The prompt of turn k+1 is the trajectory so far plus `extend(...)`. What `extend` appends is found by rendering a short
dummy conversation that ends in an assistant turn, with and without the new messages: the difference is the template's
own text after an assistant turn, whatever the real history is. So its cost does not grow with the history.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from agentloop.chat.formats import FORMATS, ToolFormat, load_format
from agentloop.chat.tokenizer import SafeEncoder
from agentloop.errors import ModelError
from agentloop.types import Message, ParsedTurn, StopReason

REMEMBERED_RENDERINGS = 1024
PROBE = "PROBE-TEXT"
MARK = "\ue0a7"
"""Stands around the number of a control token while its content is rendered; a private-use character."""

PROBE_CALL: dict[str, Any] = {"name": "probe_tool", "arguments": {"argument": "value"}}


class ChatRenderer:
    """Renders messages with a chat template and reads sampled turns.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        chat_template: Jinja text that replaces the tokenizer's own.
        tool_format: name of the tool-call format; None: found by rendering a call and reading it back.

    Raises:
        ModelError: there is no chat template, its turns have no end token, it rewrites what came before an
            observation, or its tool calls cannot be read back.
    """

    def __init__(
        self, tokenizer: Any, chat_template: str | None = None, tool_format: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._template = chat_template or tokenizer.chat_template
        if not self._template:
            raise ModelError("the tokenizer has no chat template", "set model.chat_template to a Jinja file")
        self._encoder = SafeEncoder(tokenizer)
        self._rendered: dict[str, str] = {}
        plain = self._render([_user(PROBE), _assistant(PROBE)], None, generate=False)
        tail = plain[plain.rindex(PROBE) + len(PROBE) :]
        first = self._encoder._pattern.search(tail)
        if first is None or tail[: first.start()].strip():
            raise ModelError(
                f"the chat template ends an assistant turn with {tail!r}, which holds no end-of-turn token",
                "use a template whose turns end in an added token such as <|im_end|>",
            )
        self.end_of_turn: int = self._encoder.added[first.group()]
        self._separator = tail[first.end() :]
        self._format = load_format(tool_format) if tool_format else self._find_format()
        self._stop_ids = {self.end_of_turn, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}

    def start(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Ids of a conversation's start, up to and including the generation prompt."""
        return self._encode(messages, tools, lambda protected: self._render(protected, tools, generate=True))

    def extend(
        self,
        token_ids: Sequence[int],
        stop_reason: StopReason | str,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        """The ids to append so that the model can speak after the new `messages`.

        Args:
            token_ids: the trajectory so far; it ends in a sampled turn.
            stop_reason: how that turn ended; without its end-of-turn token, that token comes first.
            messages: only the new ones.

        Raises:
            ModelError: the template cannot render these messages after an assistant turn.
        """
        lead = [] if token_ids and token_ids[-1] == self.end_of_turn else [self.end_of_turn]
        return lead + self._encode(messages, tools, lambda protected: self._after_assistant(protected, tools))

    def parse(self, sampled_ids: Sequence[int]) -> ParsedTurn:
        """Read one sampled turn; its end-of-turn token is left out, bytes that are no UTF-8 become U+FFFD."""
        ids = list(sampled_ids)
        while ids and ids[-1] in self._stop_ids:
            ids.pop()
        return self._format.parse(self.tokenizer.decode(ids, skip_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens shown."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def encode_text(self, text: str) -> list[int]:
        """Ids of content, as plain text."""
        return self._encoder.encode_plain(text)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _encode(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        render: Callable[[Sequence[Message]], str],
    ) -> list[int]:
        """Encode what `render` makes of the messages; control tokens in their contents stay plain text."""
        if not any(self._encoder.has_control(text) or MARK in text for text in _texts(messages)):
            return self._encoder.encode(render(messages))
        protected = [_map_text(message, self._protect) for message in messages]
        return self._encoder.encode_protected(render(protected), MARK)

    def _protect(self, text: str) -> str:
        return self._encoder.protect(text.replace(MARK, "\ufffd"), MARK)

    def _after_assistant(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> str:
        """The template's text after an assistant turn's end token, for these new messages."""
        answers_calls = bool(messages) and messages[0]["role"] == "tool"
        last = _assistant("", [PROBE_CALL]) if answers_calls else _assistant(PROBE)
        history = [_user(PROBE), last]
        before = self._render(history, tools, generate=False)
        after = self._render([*history, *messages], tools, generate=True)
        if not after.startswith(before):
            raise ModelError(
                "the chat template changes earlier turns when messages are added: what was sampled cannot stay as it is",
                "set model.chat_template to one that only appends",
            )
        return self._separator + after[len(before) :]

    def _render(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, *, generate: bool
    ) -> str:
        """The template's text. The samples of a group begin alike, and so do all probes: repeats are remembered."""
        key = repr((messages, tools, generate))
        text = self._rendered.get(key)
        if text is None:
            if len(self._rendered) >= REMEMBERED_RENDERINGS:
                del self._rendered[next(iter(self._rendered))]  # the oldest: groups come and go in order
            text = self._rendered[key] = self._apply_template(messages, tools, generate=generate)
        return text

    def _apply_template(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, *, generate: bool
    ) -> str:
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
            text = self._render([_user(PROBE), _assistant("", [PROBE_CALL])], None, generate=False)
        except ModelError:
            return FORMATS[
                "hermes"
            ]  # a template without tool calls; hermes reads turns without calls as they are
        turn = text[text.rindex(PROBE) + len(PROBE) :]
        for candidate in FORMATS.values():
            parsed = candidate.parse(turn)
            if [(c.name, c.arguments) for c in parsed.tool_calls] == [
                (PROBE_CALL["name"], PROBE_CALL["arguments"])
            ]:
                return candidate
        if PROBE_CALL["name"] in str(turn):
            raise ModelError(
                f"no known format reads the template's tool call back: {turn!r}",
                f"set model.tool_format to one of {', '.join(sorted(FORMATS))}, or model.chat_template to a matching one",
            )
        return FORMATS["hermes"]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str, calls: Sequence[dict[str, Any]] = ()) -> Message:
    message: Message = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]  # type: ignore[typeddict-item]
    return message


def _texts(messages: Sequence[Message]) -> list[str]:
    texts: list[str] = []
    for message in messages:
        content = message.get("content") or ""
        if isinstance(content, str):
            texts.append(content)
        else:
            texts += [part["text"] for part in content if part.get("type") == "text"]
    return texts


def _map_text(message: Message, change: Callable[[str], str]) -> Message:
    content = message.get("content") or ""
    if isinstance(content, str):
        return {**message, "content": change(content)}
    parts = [
        {**part, "text": change(part["text"])} if part.get("type") == "text" else part for part in content
    ]
    return {**message, "content": parts}
