"""The format of a template is found by what the template renders, for small and for real templates."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentloop.chat import load_tokenizer
from agentloop.chat.formats import FORMATS, find_format
from agentloop.chat.formats.base import ToolFormat
from agentloop.chat.formats.lookup import PROBES
from agentloop.chat.sampled import SampledText
from agentloop.chat.template import Template
from agentloop.errors import ModelError
from agentloop.types import ParsedTurn, ToolCall

OWN = Path(__file__).parents[1] / "templates"
OWN_FORMATS = {
    "alternation": "hermes",
    "apertus": "apertus",
    "chatml_no_newline": "hermes",
    "cohere_command": "cohere",
    "deepseek_r1": "deepseek_v3",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v3_1": "deepseek_v3",
    "deepseek_v3_2": "deepseek_v3_2",
    "gemma4": "gemma4",
    "granite_3": "granite",
    "hunyuan_hy3": "hunyuan",
    "kimi_k2": "kimi_k2",
    "lfm2": "lfm2",
    "llama2": None,
    "magistral": "mistral",
    "minimax_m2": "minimax_m2",
    "mistral_v11": "mistral",
    "mistral_v3": "mistral",
    "no_system_role": None,
    "no_tool_role": None,
    "other_generation_prompt": "hermes",
    "parts_only": "hermes",
    "phi4_mini": "phi4",
    "qwen3_coder": "qwen3_coder",
    "qwen3_thinking": "hermes",
    "seed_oss": "seed_oss",
    "step3": "step3",
    "xlam": "xlam",
}
REAL_FORMATS = {
    "gemma3": None,
    "glm4moe": "glm45",
    "gptoss": "harmony",
    "llama3_1": "llama3_json",
    "phi3_5": None,
    "qwen2_5": "hermes",
    "qwen2_5_vl": None,
    "qwen3": "hermes",
    "qwen3_instruct_2507": "hermes",
    "qwen3_vl": "hermes",
}
REAL_CONTROLS = re.compile(r"<\|\w+\|>|<(?:bos|eos|start_of_turn|end_of_turn|think|tool_call)>|</\w+_call>|</?arg_\w+>")


def turns_of(
    template: str, controls: list[str], model: Path
) -> Callable[[Sequence[dict[str, Any]]], SampledText | None]:
    """Return a function that renders a turn with calls as a model would sample it, without its end."""
    tokenizer = load_tokenizer(str(model))
    tokenizer.add_tokens(controls, special_tokens=True)
    compiled = Template(tokenizer, template, {})
    known = frozenset(token.content for token in tokenizer.added_tokens_decoder.values())

    def rendered(messages: list[Any], generate: bool) -> Any:
        text = compiled.render(messages, None, generate=generate)
        return text, tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)

    def turn_of(calls: Sequence[dict[str, Any]]) -> SampledText | None:
        made = [{"type": "function", "id": f"call{i:05}", "function": call} for i, call in enumerate(calls)]
        question = [{"role": "user", "content": "Why?"}]
        try:
            _, prompt = rendered(question, generate=True)
            text, whole = rendered([*question, {"role": "assistant", "content": "", "tool_calls": made}], False)
        except ModelError:
            return None
        first = next(
            (i for i, (a, b) in enumerate(zip(prompt.ids, whole.ids, strict=False)) if a != b), len(prompt.ids)
        )
        start = whole.offsets[first][0] if first < len(whole.ids) else len(text)
        places = {
            place[0] - start: text[slice(*place)] for place in whole.offsets[first:] if text[slice(*place)] in known
        }
        turn = SampledText(text[start:], places, known)
        last = max(places, default=len(turn))
        return turn if turn.at("</tool_call>", last) else turn.cut(0, last)  # without the end-of-turn token

    return turn_of


@pytest.mark.parametrize("name", OWN_FORMATS)
def test_the_format_of_our_own_templates_is_found(name: str, quickstart_model: Path) -> None:
    template = (OWN / f"{name}.jinja").read_text()
    listed = re.match(r"\{#- control tokens: (.*?) #\}", template)
    assert listed is not None
    found = find_format(turns_of(template, listed[1].split(), quickstart_model))
    assert (found and found.name) == OWN_FORMATS[name]


@pytest.mark.parametrize("name", REAL_FORMATS)
def test_the_format_of_real_templates_is_found(name: str, quickstart_model: Path, shared: Path) -> None:
    template = (shared / "chat_templates" / f"{name}.jinja").read_text()
    found = find_format(turns_of(template, sorted(set(REAL_CONTROLS.findall(template))), quickstart_model))
    assert (found and found.name) == REAL_FORMATS[name]


def test_every_template_of_our_own_is_looked_at() -> None:
    assert {path.stem for path in OWN.glob("*.jinja")} == set(OWN_FORMATS)


class Numbered:
    """A format of lines `N: json` that reads only the first few."""

    def __init__(self, most: int) -> None:
        self.name, self.most = f"numbered_{most}", most

    def parse(self, turn: SampledText, tools: Any = None, *, reasoning_open: bool = False) -> ParsedTurn:
        lines = [line for line in turn.text.splitlines() if line.startswith("CALL")][: self.most]
        return ParsedTurn("", tool_calls=[ToolCall(**json.loads(line.removeprefix("CALL"))) for line in lines])


def lines_of(calls: Sequence[dict[str, Any]]) -> SampledText:
    return SampledText("\n".join(f"CALL{json.dumps(call)}" for call in calls))


@pytest.fixture
def formats() -> Any:
    """The built-in formats, replaceable in a test."""
    before = dict(FORMATS)
    FORMATS.clear()
    yield FORMATS
    FORMATS.clear()
    FORMATS.update(before)


def test_a_format_that_reads_one_call_loses_against_one_that_reads_both(formats: dict[str, ToolFormat]) -> None:
    formats.update(one=Numbered(1), both=Numbered(2))
    assert find_format(lines_of) is formats["both"]


def test_a_format_that_reads_one_call_is_better_than_none(formats: dict[str, ToolFormat]) -> None:
    formats.update(one=Numbered(1))
    assert find_format(lines_of) is formats["one"]


def test_a_template_that_writes_one_call_a_turn_is_not_asked_for_two(formats: dict[str, ToolFormat]) -> None:
    formats.update(one=Numbered(1), both=Numbered(2))
    assert find_format(lambda calls: lines_of(calls[:1])) is formats["one"]
    assert find_format(lambda calls: lines_of(calls) if len(calls) == 1 else None) is formats["one"]


def test_types_that_change_on_the_way_are_noticed(formats: dict[str, ToolFormat]) -> None:
    formats.update(both=Numbered(2))
    changed = {**PROBES[0], "arguments": {**PROBES[0]["arguments"], "flag": 1}}
    assert find_format(lambda calls: lines_of([changed, *calls[1:]])) is None


def test_keys_that_the_template_sorts_are_the_same(formats: dict[str, ToolFormat]) -> None:
    formats.update(both=Numbered(2))
    ordered = [{**call, "arguments": dict(sorted(call["arguments"].items()))} for call in PROBES]
    assert find_format(lambda calls: lines_of(ordered[: len(calls)])) is formats["both"]
