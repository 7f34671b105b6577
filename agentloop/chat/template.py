"""A chat template, compiled once and rendered as `apply_chat_template` renders it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from agentloop.errors import ModelError
from agentloop.types import Message

Tools = Sequence[dict[str, Any]] | None
"""Tool schemas that the template shows the model."""


class Template:
    """Text of a conversation. transformers' own sandboxed environment runs the template; what surrounds it there (deep
    copies of every message, a new special-tokens map for each call) costs three times the rendering and is done once.

    Args:
        tokenizer: its special tokens are variables of the template (`bos_token`, `eos_token`).
        text: Jinja text; None: the tokenizer's own, which may be one for plain chats and another for tools.
        variables: further variables of the template, such as `enable_thinking`.

    Raises:
        ModelError: there is no template, or it is no valid Jinja.
    """

    def __init__(self, tokenizer: Any, text: str | None, variables: Mapping[str, Any]) -> None:
        own = text or tokenizer.chat_template
        if not own:
            raise ModelError("the tokenizer has no chat template", "set model.chat_template to a Jinja file")
        named: dict[str, str] = own if isinstance(own, dict) else {"default": own}
        if "default" not in named:
            raise ModelError(
                f"the tokenizer has several chat templates and no default: {', '.join(sorted(named))}",
                "set model.chat_template to the Jinja file of one of them",
            )
        self._plain = _compile(named["default"])
        self._with_tools = _compile(named["tool_use"]) if "tool_use" in named else self._plain
        self.text = named["default"]
        self._variables = {"documents": None, **tokenizer.special_tokens_map, **variables}
        self._texts = [named[name] for name in ("default", "tool_use") if name in named]

    def strings(self) -> frozenset[str]:
        """Every string that the template could look for in a content: those written in its expressions, and variables.

        Not those that name a key, and not those that a role is compared with.
        """
        from jinja2 import nodes

        found: set[str] = {value for value in self._variables.values() if isinstance(value, str)}
        for text in self._texts:
            tree = self._plain.environment.parse(text)
            keys = {id(item.arg) for item in tree.find_all(nodes.Getitem)}
            for compared in tree.find_all(nodes.Compare):
                if _is_role(compared.expr):
                    for operand in compared.ops:
                        keys |= {id(const) for const in (operand.expr, *operand.expr.find_all(nodes.Const))}
            found |= {
                const.value
                for const in tree.find_all(nodes.Const)
                if isinstance(const.value, str) and id(const) not in keys
            }
        return frozenset(found)

    def render(self, messages: Sequence[Message], tools: Tools, *, generate: bool) -> str:
        """The conversation's text, with the generation prompt when `generate`.

        Raises:
            ModelError: the template refuses these messages; its own words are in the error.
        """
        from jinja2 import TemplateError

        compiled = self._with_tools if tools else self._plain
        try:
            return str(
                compiled.render(
                    messages=[_plain(message) for message in messages],
                    tools=list(tools) if tools else None,
                    add_generation_prompt=generate,
                    **self._variables,
                )
            )
        except (TemplateError, TypeError, KeyError, ValueError, AttributeError, IndexError) as exc:
            roles = ", ".join(message["role"] for message in messages)
            raise ModelError(
                f"the chat template cannot render the roles [{roles}]: {exc}",
                "change the rows' prompt, or set model.chat_template to one that can",
            ) from exc


def _compile(text: str) -> Any:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        compiled = _compile_jinja_template(text)
    except TemplateSyntaxError as exc:
        raise ModelError(
            f"the chat template is no valid Jinja: line {exc.lineno}: {exc.message}", "correct it, or use another"
        ) from exc
    # A template looks up some thirty attributes of dicts, and its globals once for each rendering: both in the quickest
    # way that gives the same, a third of the time of a rendering.
    compiled.globals = dict(compiled.globals)
    if not isinstance(compiled.environment.getattr, partial):  # compiled templates are remembered, by their text
        compiled.environment.getattr = partial(_getattr, compiled.environment.getattr)
        compiled.environment.filters["tojson"] = partial(_tojson, compiled.environment.filters["tojson"])
    return compiled


def _is_role(node: Any) -> bool:
    """Whether it is `message.role` or `message['role']`."""
    return getattr(node, "attr", None) == "role" or getattr(getattr(node, "arg", None), "value", None) == "role"


class Fixed(dict[str, Any]):
    """A mapping that nobody changes: its JSON is written once."""

    _text: str | None = None


_write_json = json.JSONEncoder(ensure_ascii=False).encode


def _tojson(slow: Callable[..., str], value: Any, *args: Any, **options: Any) -> str:
    """transformers' `tojson`: the same text, without a new encoder for each."""
    if args or options:
        return slow(value, *args, **options)
    if type(value) is not Fixed:
        return _write_json(value)
    if value._text is None:
        value._text = _write_json(value)
    return value._text


def _getattr(slow: Callable[[Any, str], Any], value: Any, name: str) -> Any:
    """`value.name` as Jinja means it: an attribute, else an item. A method of dicts hides the item of its name."""
    if type(value) is dict and name in value and name not in _DICT_ATTRIBUTES:
        return value[name]
    return slow(value, name)


_DICT_ATTRIBUTES = frozenset(dir(dict))
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_REASONING = frozenset(REASONING_KEYS)


def _plain(message: Message) -> dict[str, Any]:
    """The message as transformers shows it to a template: no None, reasoning under each of its names, no rich object.

    A template is code that came with the model; an image object would give it methods to call. What needs no change is
    not copied: the sandbox lets a template change nothing.
    """
    if type(message["content"]) is str and None not in message.values() and _REASONING.isdisjoint(message):
        return message  # type: ignore[return-value]
    shown = {key: value for key, value in message.items() if value is not None}
    for key in REASONING_KEYS:
        if key in shown:
            shown = {"thinking": shown[key], **shown, "reasoning_content": shown[key]}
            break
    content = shown.get("content")
    if isinstance(content, list):
        shown["content"] = [
            {
                key: value if isinstance(value, str | int | float) else f"<{type(value).__name__}>"
                for key, value in part.items()
            }
            if isinstance(part, dict)
            else str(part)
            for part in content
        ]
    return shown


def texts(value: Any) -> Iterator[str]:
    """Every string in a message or schema, however deep. The text parts of one content also as one text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
        parts = [item["text"] for item in value if isinstance(item, dict) and isinstance(item.get("text"), str)]
        if len(parts) > 1:  # a template may write them one behind the other
            yield "".join(parts)
