"""The probe: a short, known conversation that is rendered before the new messages.

The text after the probe's last words in a rendering was written by the template.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentloop.chat.template import Fixed
from agentloop.errors import ModelError
from agentloop.types import Message

QUESTION, ANSWER, VALUE = "PROBE-QUESTION", "PROBE-ANSWER", "PROBE-VALUE"
TOOL, CALL_ID = "probe_tool", "probe0000"


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def calling(names: Sequence[str], ids: Sequence[str], value: str = VALUE) -> Message:
    """Return a turn with one call for each name; call `i` has the argument `VALUE-000i`."""
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


def result(text: str) -> Message:
    """Return a result of the probe's call."""
    return {"role": "tool", "name": TOOL, "tool_call_id": CALL_ID, "content": text}


def is_call(history: list[Message]) -> bool:
    """Whether the last turn of the probe has calls."""
    return "tool_calls" in history[-1]


def end_of_words(text: str, history: list[Message]) -> int:
    """Return where the last known words of the probe's turn end in a rendering.

    Raises:
        ModelError: the template does not render the turn.
    """
    position = max(text.find(QUESTION), 0)
    if not is_call(history):
        found = text.find(ANSWER, position)
        if found < 0:
            raise _not_rendered("an assistant's answer", text)
        return found + len(ANSWER)

    last = f"{VALUE}-{len(history[-1]['tool_calls']) - 1:04d}"
    found = text.find(last, position)
    if found < 0:
        raise _not_rendered("a tool call", text)
    return found + len(last)


def _not_rendered(what: str, text: str) -> ModelError:
    return ModelError(
        f"the chat template does not render {what}: {text[-200:]!r}", "set model.chat_template to one that does"
    )
