"""Find the tool whose schema a chat template cannot render, before a run starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentloop.chat.call_forms import PROBE_TOOL
from agentloop.chat.renderer import ChatRenderer
from agentloop.errors import ModelError
from agentloop.types import Message

QUESTION: Message = {"role": "user", "content": "Begin."}


def check_schemas(renderer: ChatRenderer, schemas: Sequence[dict[str, Any]]) -> None:
    """Refuse a schema with which the template fails, or which it leaves out.

    Templates read schemas each in their own way: one needs a description, another a `type` for each
    property, which `anyOf` and `$ref` do not have.

    Raises:
        ModelError: names the tool and the template's own reason.
    """
    if not schemas:
        return
    try:
        plain = renderer.decode(renderer.start([QUESTION], [PROBE_TOOL]))
    except ModelError:
        return  # the template takes no tools at all, which the proof explains
    for schema in schemas:
        name = schema["function"]["name"]
        try:
            text = renderer.decode(renderer.start([QUESTION], [schema]))
        except ModelError as exc:
            raise ModelError(
                f"the chat template cannot render the schema of the tool {name}: {exc.message}",
                "give every property a type and a description in its tool_schema, or use another chat template",
            ) from exc
        if PROBE_TOOL["function"]["name"] in plain and name not in text:
            raise ModelError(
                f"the chat template leaves out the tool {name}: the model would not know it",
                "compare its tool_schema with one that is rendered (`agentloop template MODEL --tools FILE`)",
            )
