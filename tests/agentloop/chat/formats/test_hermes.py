"""Hermes calls: whatever a model writes is read or reported, never raised."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentloop.chat.formats import HermesFormat
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def read(text: str, *, reasoning_open: bool = False) -> ParsedTurn:
    return HermesFormat().parse(SampledText(text), reasoning_open=reasoning_open)


def written(name: str, arguments: Any) -> str:
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


@given(
    name=st.from_regex(r"[\w.:/-]+", fullmatch=True),
    arguments=st.dictionaries(st.text(), JSON, max_size=4),
    count=st.integers(1, 3),
    before=st.text(st.characters(exclude_characters="<")),
)
def test_calls_read_back_whatever_their_arguments(
    name: str, arguments: dict[str, Any], count: int, before: str
) -> None:
    parsed = read(before + "\n".join([written(name, arguments)] * count))
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == [(name, arguments)] * count
    assert not parsed.malformed_calls
    assert parsed.text == before.strip()


@given(st.text('<tool_call>/{}"name:arguments,\n \\', max_size=80))
def test_nothing_a_model_writes_raises(text: str) -> None:
    read(text)


def test_a_string_may_hold_the_closing_tag() -> None:
    parsed = read(written("t", {"text": "a </tool_call> b"}) + "after")
    assert parsed.tool_calls[0].arguments == {"text": "a </tool_call> b"}
    assert parsed.text == "after"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('<tool_call>\n{"name": "x", "argum', "cut off"),
        ('<tool_call>\n{"name": "x", "arguments": {}', "cut off"),
        ('<tool_call>\n{"name": "x", "arguments": {}} and more\n</tool_call>', "text after"),
        ("<tool_call>\n[1]\n</tool_call>", "not a JSON object"),
        ('<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>', '"name"'),
        ('<tool_call>\n{"name": "x", "arguments": "y"}\n</tool_call>', '"arguments"'),
        ("<tool_call>\n</tool_call>", "not valid JSON"),
        # Values that would fail later, in a tool, a tokenizer or the trace, make the call malformed
        # here.
        ('<tool_call>{"name": "x", "arguments": {"n": NaN}}</tool_call>', "NaN is not a number"),
        ('<tool_call>{"name": "x", "arguments": {"n": 1e999}}</tool_call>', "too large"),
        ('<tool_call>{"name": "x", "arguments": {"n": 9223372036854775808}}</tool_call>', "64 bits"),
        ('<tool_call>{"name": "x", "arguments": {"n": ' + "9" * 9000 + "}}</tool_call>", "64 bits"),
        ('<tool_call>{"name": "x", "arguments": {"n": "\\ud800"}}</tool_call>', "surrogate"),
        ('<tool_call>{"name": "x", "arguments": {"n": ' + "[" * 90 + "]" * 90 + "}}</tool_call>", "nested"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "nested"),
    ],
)
def test_a_malformed_call_comes_with_its_reason(text: str, reason: str) -> None:
    parsed = read(text)
    assert not parsed.tool_calls
    assert [reason in call.reason for call in parsed.malformed_calls] == [True]


def test_good_calls_around_a_malformed_one_are_kept() -> None:
    parsed = read(written("a", {}) + "<tool_call>{</tool_call>" + written("b", {}))
    assert [call.name for call in parsed.tool_calls] == ["a", "b"]
    assert len(parsed.malformed_calls) == 1


def test_a_forgotten_closing_tag_is_read_where_the_next_call_begins() -> None:
    first = written("a", {}).removesuffix("</tool_call>")
    parsed = read(first + written("b", {}) + "after")
    assert [call.name for call in parsed.tool_calls] == ["a", "b"]
    assert not parsed.malformed_calls
    assert parsed.text == "after"


def test_reasoning_is_kept_apart_and_calls_in_it_are_none() -> None:
    parsed = read(f"\n<think>\nPerhaps {written('a', {})}\n</think>\n\nSo: {written('b', {})}")
    assert parsed.reasoning == f"Perhaps {written('a', {})}"
    assert [call.name for call in parsed.tool_calls] == ["b"]
    assert parsed.text == "So:"


@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "said"),
    [
        ("I think.\n</think>\n\nYes.", True, "I think.", "Yes."),
        ("<think>I think.</think>Yes.", True, "I think.", "Yes."),
        ("I thi", True, "I thi", ""),
        ("<think>I thi<tool_call>", False, "I thi<tool_call>", ""),
        ("<think>\n\n</think>\n\nYes.", False, None, "Yes."),
        ("Yes.", False, None, "Yes."),
        ("Well, <think>no</think>", False, None, "Well, <think>no</think>"),
    ],
)
def test_a_block_of_reasoning_is_one_at_the_beginning(
    text: str, is_open: bool, reasoning: str | None, said: str
) -> None:
    parsed = read(text, reasoning_open=is_open)
    assert (parsed.reasoning, parsed.text) == (reasoning, said)
    assert not parsed.tool_calls and not parsed.malformed_calls
