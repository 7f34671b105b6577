"""Templates that take the arguments of calls as text, and those that write ids in place of names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentloop.chat import ChatRenderer, load_tokenizer
from agentloop.chat.call_forms import CallForms, find_call_forms
from agentloop.chat.template import Template

OWN = Path(__file__).parent / "templates"
OBJECT = (
    "{% for m in messages %}{{ m.role }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endfor %}"
)
PASTED = OBJECT.replace("c.function | tojson", "c.function.name + c.function.arguments")
PRINTED = OBJECT.replace("c.function | tojson", "c.function.name ~ c.function.arguments")
BY_ID = OBJECT.replace("c.function | tojson", "c.id + (c.function.arguments | tojson)")
BOTH = OBJECT.replace("c.function | tojson", "c.id + c.function.arguments")
NONE = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "forms"),
    [
        (OBJECT, CallForms()),
        (PASTED, CallForms(arguments_as_text=True)),
        (PRINTED, CallForms(arguments_as_text=True)),
        (BY_ID, CallForms(names_in_ids=True)),
        (BOTH, CallForms(arguments_as_text=True, names_in_ids=True)),
        (NONE, CallForms()),
        ("{{ raise_exception('never') }}", CallForms()),
    ],
)
def test_the_form_that_a_template_takes_is_found(template: str, forms: CallForms, quickstart_model: Path) -> None:
    assert Template(load_tokenizer(str(quickstart_model)), template, {})._forms == forms


def call(name: str, arguments: Any, call_id: str | None = None) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made if call_id is None else {**made, "id": call_id}


def test_the_messages_of_the_caller_stay_as_they_are() -> None:
    arguments = {"a": "漢字"}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call("f", arguments, "x")]}]
    shown = CallForms(arguments_as_text=True, names_in_ids=True).shown(messages)
    assert shown[0]["tool_calls"] == [call("f", '{"a": "漢字"}', "functions.f:0")]
    assert messages == [{"role": "assistant", "content": "", "tool_calls": [call("f", arguments, "x")]}]


def test_arguments_that_are_text_are_kept() -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [call("f", "{}")]}
    assert CallForms(arguments_as_text=True).shown([message]) == [message]


def test_ids_contain_names_and_results_follow_them() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "tool_calls": [call("f", {}, "call_a"), call("g", {}, "functions.g:7")]},
        {"role": "tool", "tool_call_id": "call_a"},
        {"role": "tool", "tool_call_id": "functions.g:7"},
        {"role": "tool", "tool_call_id": "unknown"},
        {"role": "tool"},
        {"role": "assistant", "tool_calls": [call("f", {}, "call_b"), call("f", {}), call("f", {}, "call04")]},
    ]
    shown = CallForms(names_in_ids=True).shown(messages)
    ids = [[one["id"] for one in message.get("tool_calls", [])] or message.get("tool_call_id") for message in shown]
    assert ids == [
        ["functions.f:0", "functions.g:7"],
        "functions.f:0",
        "functions.g:7",
        "unknown",
        None,
        ["functions.f:2", "functions.f:3", "functions.f:4"],
    ]


def test_a_template_that_refuses_everything_keeps_the_default() -> None:
    assert find_call_forms(lambda _: None) == CallForms()


@pytest.mark.parametrize("name", ["kimi_k2", "deepseek_v3_1"])
def test_a_call_of_the_rows_is_rendered_and_read_back(name: str, quickstart_model: Path) -> None:
    template = (OWN / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(str(quickstart_model))
    tokenizer.add_tokens(template[: template.index(" #}")].split()[3:], special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    renderer = ChatRenderer(tokenizer, chat_template=template)
    message: Any = {"role": "assistant", "content": "", "tool_calls": [call("f", {"a": [1, "é"]}, "call_x")]}
    parsed = renderer.parse(renderer.turn_ids(message))
    assert [(one.name, one.arguments) for one in parsed.tool_calls] == [("f", {"a": [1, "é"]})]
    assert not parsed.malformed_calls
