"""`ContentForms`: whether a template takes contents as text or as a list of parts.

Most templates write `message['content']`. Some go through the parts of each content, as in
`{% for part in message['content'] %}{{ part['text'] }}`: of text they see the characters, and write
nothing. Others fail on parts, or write them in Python syntax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_CALL = {"type": "function", "id": "probe0000", "function": {"name": "probe_form", "arguments": {}}}
_USER: dict[str, Any] = {"role": "user", "content": "Begin."}
_AROUND: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "user": ([], []),
    "assistant": ([_USER], []),
    "system": ([], [_USER]),
    "tool": ([_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}], []),
}
"""The messages before and after a message of each role, so that a template accepts it."""

_KEYS = {"tool": {"tool_call_id": "probe0000", "name": "probe_form"}}
"""Further keys of a message."""


@dataclass(frozen=True, slots=True)
class ContentForms:
    """The form of contents in messages for a template, by role.

    Attributes:
        as_parts: the roles whose text is given as a list of one part.
        as_text: the roles whose parts are given as one text, if all of them are text.
    """

    as_parts: frozenset[str] = frozenset()
    as_text: frozenset[str] = frozenset()

    def shown(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages with their contents in this form; the given ones are not changed."""
        if not self.as_parts and not self.as_text:
            return messages
        return [self._shown(message) for message in messages]

    def _shown(self, message: dict[str, Any]) -> dict[str, Any]:
        content, role = message.get("content"), message["role"]
        if isinstance(content, str) and role in self.as_parts:
            return {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list) and role in self.as_text and all(_is_text(part) for part in content):
            return {**message, "content": "".join(part["text"] for part in content)}
        return message


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def find_content_forms(render: Callable[[Sequence[dict[str, Any]]], str | None]) -> ContentForms:
    """Return the form in which a template takes the contents of each role.

    A role whose content the template writes in neither form keeps its contents as they are.

    Args:
        render: renders messages; None if the template refuses them.
    """
    forms = ContentForms()
    for role, (before, after) in _AROUND.items():
        words = f"probe-{role}"
        message = {"role": role, **_KEYS.get(role, {})}
        as_text = _rendered(render, forms, before, {**message, "content": words}, after)
        parts = [{"type": "text", "text": words}]
        as_parts = _rendered(render, forms, before, {**message, "content": parts}, after)

        takes_text = words in as_text
        takes_parts = words in as_parts and "'text'" not in as_parts and '"text"' not in as_parts
        if takes_parts and not takes_text:
            forms = ContentForms(forms.as_parts | {role}, forms.as_text)
        elif takes_text and not takes_parts:
            forms = ContentForms(forms.as_parts, forms.as_text | {role})
    return forms


def _rendered(
    render: Callable[[Sequence[dict[str, Any]]], str | None],
    forms: ContentForms,
    before: list[dict[str, Any]],
    message: dict[str, Any],
    after: list[dict[str, Any]],
) -> str:
    """Return the text of a message among others; empty if the template refuses it."""
    return render([*forms.shown(before), message, *forms.shown(after)]) or ""
