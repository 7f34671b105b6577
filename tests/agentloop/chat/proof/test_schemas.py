"""A tool whose schema the template cannot render is found before a run, by its name."""

from __future__ import annotations

from typing import Any

import pytest

from agentloop.chat import ChatRenderer
from agentloop.chat.proof.schemas import check_schemas
from agentloop.errors import ModelError

PICKY = (
    "{%- if tools %}{%- for t in tools %}<|im_start|>tools {{ t.function.name }}: {{ t.function.description | upper }}"
    "{%- for n, p in t.function.parameters.properties.items() %} {{ n }}={{ p.type | upper }}{%- endfor %}<|im_end|>\n"
    "{%- endfor %}{%- endif %}"
)
PLAIN = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)


def schema(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def test_the_tool_and_the_reason_are_named(renderer: ChatRenderer) -> None:
    strict = PICKY.replace("p.type | upper", "p.type.upper()") + PLAIN
    strict_renderer = ChatRenderer(renderer.tokenizer, strict)
    check_schemas(strict_renderer, [schema("fine", x={"type": "string"})])
    with pytest.raises(ModelError, match=r"cannot render the schema of the tool union: .*type"):
        check_schemas(strict_renderer, [schema("fine"), schema("union", x={"anyOf": [{"type": "string"}]})])


def test_a_tool_that_is_left_out_is_named(renderer: ChatRenderer) -> None:
    picky = PICKY.replace("in tools %}<", "in tools if t.function.name != 'shy' %}<") + PLAIN
    with pytest.raises(ModelError, match="leaves out the tool shy"):
        check_schemas(ChatRenderer(renderer.tokenizer, picky), [schema("shy")])
