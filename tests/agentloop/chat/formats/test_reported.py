"""Turns that were read wrongly once, word by word as they were reported."""

from __future__ import annotations

import re
from typing import Any

import pytest

from agentloop.chat.formats import FORMATS, load_format
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
    for name in ("weather", "news")
]
QWEN = ("<tool_call>", "</tool_call>")
GLM = (*QWEN, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")


def read(name: str, text: str, controls: tuple[str, ...] = ()) -> ParsedTurn:
    """Read a turn in which these tags were sampled as control tokens wherever they stand."""
    found = re.finditer("|".join(map(re.escape, controls)), text) if controls else ()
    turn = SampledText(text, {match.start(): match.group() for match in found}, controls)
    return load_format(name).parse(turn, TOOLS)


def calls(parsed: ParsedTurn) -> list[tuple[str, dict[str, Any]]]:
    return [(call.name, call.arguments) for call in parsed.tool_calls]


@pytest.mark.parametrize("controls", [QWEN, ()])
def test_qwen3_coder_closes_a_parameter_where_the_next_begins(controls: tuple[str, ...]) -> None:
    text = (
        "<tool_call>\n<function=weather>\n<parameter=city>\nDallas\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>"
    )
    parsed = read("qwen3_coder", text, controls)
    assert calls(parsed) == [("weather", {"city": "Dallas", "days": 3})]
    assert not parsed.malformed_calls


@pytest.mark.parametrize("controls", [QWEN, ()])
def test_qwen3_coder_does_not_swallow_the_next_call(controls: tuple[str, ...]) -> None:
    second = "<tool_call>\n<function=news>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"
    parsed = read("qwen3_coder", f"<tool_call>\n<function=weather>\n<parameter=city>\nDallas\n{second}", controls)
    assert calls(parsed) == [("news", {"city": "Rome"})]
    assert ["<tool_call> must not stand within a value" in call.reason for call in parsed.malformed_calls] == [True]


def test_qwen3_coder_reports_a_value_that_quotes_its_own_tags() -> None:
    value = "see <parameter=x>1</parameter> there"
    text = f"<tool_call><function=news><parameter=city>{value}</parameter></function></tool_call>"
    parsed = read("qwen3_coder", text, QWEN)
    assert not parsed.tool_calls and len(parsed.malformed_calls) == 1


def test_glm45_closes_a_value_where_the_next_key_begins() -> None:
    text = (
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Dallas\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>"
    )
    assert calls(read("glm45", text, GLM)) == [("weather", {"city": "Dallas", "days": 3})]


def test_glm45_does_not_swallow_the_next_call() -> None:
    second = "<tool_call>news\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>"
    parsed = read("glm45", f"<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Dallas\n{second}", GLM)
    assert calls(parsed) == [("news", {"city": "Rome"})]
    assert ["must not stand within a value" in call.reason for call in parsed.malformed_calls] == [True]


@pytest.mark.parametrize("between", [" ", "", "\n"])
def test_mistral_reads_a_repeated_tag_once(between: str) -> None:
    text = f'[TOOL_CALLS]{between}[TOOL_CALLS]{between}[{{"name": "weather", "arguments": {{"city": "Paris"}}}}]'
    parsed = read("mistral", text, ("[TOOL_CALLS]",))
    assert (calls(parsed), parsed.malformed_calls, parsed.text) == ([("weather", {"city": "Paris"})], [], "")


def test_mistral_reads_a_name_directly_before_its_arguments() -> None:
    parsed = read("mistral", '[TOOL_CALLS]weather{"city": "Paris"}', ("[TOOL_CALLS]", "[ARGS]"))
    assert calls(parsed) == [("weather", {"city": "Paris"})]


@pytest.mark.parametrize(
    "text",
    [
        '[weather(city="Rome", days=3), news()]',
        '<|python_start|>[weather(city="Rome", days=3), news()]<|python_end|>',
        "<function_calls>\nweather(city='Rome', days=3)\nnews()\n</function_calls>",
        '<function_calls>weather(city="Rome", days=3)\nnews()',
    ],
)
def test_pythonic_reads_python_calls(text: str) -> None:
    parsed = read("pythonic", text)
    assert calls(parsed) == [("weather", {"city": "Rome", "days": 3}), ("news", {})]
    assert (parsed.malformed_calls, parsed.text) == ([], "")


@pytest.mark.parametrize("text", ["[see](https://x.org)", "[f(x) for x in y]", "[1, 2]", "[news] Rain.", "[a(b)]"])
def test_pythonic_leaves_other_lists_alone(text: str) -> None:
    assert read("pythonic", text) == ParsedTurn(text)


def test_pythonic_reports_an_offered_tool_that_is_called_by_position() -> None:
    [fault] = read("pythonic", '[weather("Rome")]').malformed_calls
    assert "key=value" in fault.reason


@pytest.mark.parametrize("name", ["TEXT", "RESPONSE"])
def test_the_frame_of_commands_answer_is_dropped(name: str) -> None:
    tags = (f"<|START_{name}|>", f"<|END_{name}|>", "<|START_ACTION|>", "<|END_ACTION|>")
    assert read("cohere", f"{tags[0]}Yes.{tags[1]}", tags) == ParsedTurn("Yes.")


def test_gpt_oss_does_not_give_one_call_the_arguments_of_another() -> None:
    controls = ("<|start|>", "<|channel|>", "<|message|>", "<|call|>")
    text = (
        "<|channel|>commentary to=functions.weather <|call|><|start|>assistant"
        '<|channel|>commentary to=functions.news <|message|>{"city": "Rome"}<|call|>'
    )
    parsed = read("harmony", text, controls)
    assert calls(parsed) == [("news", {"city": "Rome"})]
    assert ["cut off before <|message|>" in call.reason for call in parsed.malformed_calls] == [True]


def test_llama_reads_the_calls_after_a_malformed_one() -> None:
    text = '<|python_tag|>{"name": <|python_tag|>{"name": "news", "parameters": {}}'
    parsed = read("llama3_json", text, ("<|python_tag|>",))
    assert calls(parsed) == [("news", {})]
    assert len(parsed.malformed_calls) == 1


def test_an_answer_with_a_name_is_no_call() -> None:
    text = '{"name": "Ann", "age": 3}'
    assert read("llama3_json", text) == ParsedTurn(text)
    assert calls(read("llama3_json", '{"name": "news"}')) == [("news", {})]


@pytest.mark.parametrize("name", ["hermes", "cohere", "mistral", "llama3_json"])
def test_a_wrong_call_in_a_list_does_not_lose_the_next(name: str) -> None:
    form = FORMATS[name]
    opening = {"cohere": "<|START_ACTION|>", "mistral": "[TOOL_CALLS]", "hermes": "<tool_call>"}.get(name, "")
    keys = {"cohere": ("tool_name", "parameters"), "llama3_json": ("name", "parameters")}
    key, given = keys.get(name, ("name", "arguments"))
    wrong, right = f'{{"{key}": "weather", "{given}": {{"days": 07}}}}', f'{{"{key}": "news", "{given}": {{}}}}'
    text = f"{opening}[{wrong}, {right}]" if opening else f"{wrong}; {right}"
    parsed = form.parse(SampledText(text), TOOLS)
    assert calls(parsed) == [("news", {})]
    assert ["must not begin with 0" in call.reason for call in parsed.malformed_calls] == [True]
