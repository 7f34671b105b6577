"""A chat template: compiled once, rendered as `apply_chat_template` renders it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentloop.chat.call_forms import PROBE_TOOL, CallForms, find_call_forms
from agentloop.chat.content_forms import ContentForms, find_content_forms
from agentloop.errors import ModelError
from agentloop.text import clean, did_you_mean
from agentloop.types import Message

Tools = Sequence[dict[str, Any]] | None
"""Tool schemas that the template shows to the model."""


class EndlessTemplate(ModelError):
    """The chat template computes without end."""


class Template:
    """Renders conversations as text, in a sandboxed Jinja environment with transformers' settings.

    `apply_chat_template` deep-copies every message and builds a new special-tokens map in each
    call, which costs three times the rendering itself. Here both are done once or never.

    Args:
        tokenizer: its special tokens are variables of the template (`bos_token`, `eos_token`).
        text: Jinja text; None: use the tokenizer's own, which may have separate ones for plain
            chats and for tools.
        variables: further variables of the template, such as `enable_thinking`.

    Raises:
        ModelError: there is no template, it is not valid Jinja, or it is empty or writes nothing.
    """

    def __init__(self, tokenizer: Any, text: str | None, variables: Mapping[str, Any]) -> None:
        # Imported here because it loads transformers, which takes a second.
        from agentloop.chat.environment import compile_template

        own = tokenizer.chat_template if text is None else text
        if own is None or own == {}:
            raise ModelError("the tokenizer has no chat template", "set model.chat_template to a Jinja file")

        named: dict[str, str] = own if isinstance(own, dict) else {"default": own}
        if "default" not in named:
            raise ModelError(
                f"the tokenizer has several chat templates but no default: {', '.join(sorted(named))}",
                "set model.chat_template to the Jinja file of one of them",
            )

        for name, source in named.items():
            if not source.strip():
                which = "the chat template" if len(named) == 1 else f"the chat template {name!r}"
                raise ModelError(
                    f"{which} is empty", "set model.chat_template to a Jinja file, or restore the tokenizer's"
                )

        self._plain = compile_template(named["default"])
        self._with_tools = compile_template(named["tool_use"]) if "tool_use" in named else self._plain
        self.text = named["default"]
        self._variables = {"documents": None, **tokenizer.special_tokens_map, **variables}
        self._texts = [named[name] for name in ("default", "tool_use") if name in named]
        self._check_variables(variables)
        self._contents = ContentForms()
        self._forms = CallForms()
        self._contents = find_content_forms(self._probe)
        self._forms = find_call_forms(self._probe)
        if self._forms != CallForms():
            # A result follows a call, so its form is found once the template accepts calls.
            self._contents = ContentForms()
            self._contents = find_content_forms(self._probe)
        self._refuse_silence()

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        """Refuse a variable that the template does not read: it would have no effect."""
        if not variables:
            return
        from jinja2 import meta

        parse = self._plain.environment.parse
        read = set().union(*(meta.find_undeclared_variables(parse(text)) for text in self._texts))
        known = sorted(read - {"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})
        for name in variables:
            if name not in read:
                raise ModelError(
                    f"chat_template_kwargs: the chat template does not read {clean(repr(name), 100)}; "
                    f"it reads {', '.join(known) or 'none'}",
                    did_you_mean(str(name), known, "correct the name, or leave it out"),
                )

    def _refuse_silence(self) -> None:
        """Refuse a template that writes nothing, for instance one that is only a comment."""
        question: Message = {"role": "user", "content": "Begin."}
        try:
            text = self.render([question], None, generate=True)
        except EndlessTemplate:
            raise
        except ModelError:
            return  # it may need other messages; whoever renders those sees the error
        if not text.strip():
            raise ModelError(
                "the chat template renders nothing for a user message", "set model.chat_template to one that writes it"
            )

    def _probe(self, messages: Sequence[dict[str, Any]]) -> str | None:
        """Return the text of messages; None if the template refuses them."""
        tools = None if self._with_tools is self._plain else [PROBE_TOOL]
        try:
            return self.render(messages, tools, generate=False)  # type: ignore[arg-type]  # dicts are messages
        except EndlessTemplate:
            raise  # it would take as long for every question
        except ModelError:
            return None

    def strings(self) -> frozenset[str]:
        """Return every string that the template could search for in a content.

        These are the string constants in its expressions and its variables, except constants that
        name a key or that a role is compared with.
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
        """Return the text of a conversation, with the generation prompt if `generate`.

        Raises:
            ModelError: the template refuses these messages or fails; the error quotes the
                template's own message.
            EndlessTemplate: it computes more than any conversation needs.
        """
        from agentloop.chat import work

        compiled = self._with_tools if tools else self._plain
        work.begin()
        try:
            return str(
                compiled.render(
                    messages=self._forms.shown(self._contents.shown([_plain(message) for message in messages])),
                    tools=list(tools) if tools else None,
                    add_generation_prompt=generate,
                    **self._variables,
                )
            )
        except Exception as exc:  # a template is a program: it may divide by 0 or recurse without end
            from jinja2 import TemplateError

            if isinstance(exc, work.TooMuchWork):
                raise EndlessTemplate(
                    f"the chat template does too much: {exc}", "set model.chat_template to another file"
                ) from exc
            roles = ", ".join(message["role"] for message in messages)
            said = str(exc) if isinstance(exc, TemplateError) else f"{type(exc).__name__}: {exc}"
            raise ModelError(
                f"the chat template cannot render the roles [{roles}]: {said}",
                "change the rows' prompt, or set model.chat_template to one that supports these roles",
            ) from exc


def read_template(path: Path | None, named: str) -> str | None:
    """Return the text of a Jinja file; None for None.

    Args:
        path: the file.
        named: the key or option that names it, for error messages.

    Raises:
        ModelError: it is not a file, cannot be read, is not UTF-8, or is empty.
    """
    if path is None:
        return None
    try:
        if not path.is_file():
            raise ModelError(f"{named} {path} is not an existing file", "give a Jinja file")
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as exc:
        raise ModelError(f"{named} {path} cannot be read: {exc}", "give a readable Jinja file in UTF-8") from exc
    if not text.strip():
        raise ModelError(
            f"{named} {path} is empty", "give a Jinja file that renders the messages, or leave the key out"
        )
    return text


def _is_role(node: Any) -> bool:
    """Whether the node is `message.role` or `message['role']`."""
    return getattr(node, "attr", None) == "role" or getattr(getattr(node, "arg", None), "value", None) == "role"


class Fixed(dict[str, Any]):
    """A mapping that never changes, so its JSON is computed once."""

    _text: str | None = None


REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_REASONING = frozenset(REASONING_KEYS)


def _plain(message: Message) -> dict[str, Any]:
    """Return the message as transformers shows it to a template.

    None values are left out, reasoning is given under each of its names, and objects such as images
    become text: a template is code that came with the model, and an image object would give it
    methods to call.

    A message that needs no change is not copied, because the sandbox lets a template change
    nothing.
    """
    if type(message["content"]) is str and None not in message.values() and _REASONING.isdisjoint(message):
        return message  # type: ignore[return-value]  # a TypedDict is a dict at run time

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
    """Yield every string in a message or schema, at any depth.

    The text parts of one content are also yielded joined, because a template may write them one
    after the other.
    """
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
        if len(parts) > 1:
            yield "".join(parts)
