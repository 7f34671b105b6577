"""A turn that repeats the beginning of a call is read with bounded work, in every format."""

from __future__ import annotations

import pytest

from agentloop.chat.formats import FORMATS, load_format
from agentloop.chat.formats.base import MOST_MALFORMED
from agentloop.chat.formats.values import MOST_SCANNED
from agentloop.chat.sampled import SampledText

LIMIT = "the rest of the turn is not read"
BODIES = (
    "",
    "{",
    "[",
    "[{",
    '{"a":"',
    '{"a":(',
    "{'a':\"",
    "f{",
    "f(",
    "[f(x='",
    '{"a":07',
    '[{"name":"f"},',
    '{"name":07} ',
)
OPENINGS = [(name, tag) for name, form in FORMATS.items() for tag in getattr(form, "tags", ())]
BROKEN, CALL = '<tool_call>{"name": 07}</tool_call>', '<tool_call>{"name": "f"}</tool_call>'


@pytest.mark.parametrize(("name", "tag"), OPENINGS)
def test_repeated_beginnings_are_reported_and_scanned_a_bounded_number_of_times(name: str, tag: str) -> None:
    for body in BODIES:
        turn = SampledText(f"{tag}{body}" * 150 + "x" * 500)
        parsed = load_format(name).parse(turn)
        assert len(parsed.malformed_calls) <= MOST_MALFORMED + 1, body
        assert turn.scanned <= (MOST_SCANNED + 1) * len(turn), body
        assert sum(len(call.text) for call in parsed.malformed_calls) <= len(turn), body


@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("hermes", "<tool_call>{"),
        ("hermes", '<tool_call>{"name":"f","arguments":"'),
        ("llama3_json", '<|python_tag|>{"name":"f","parameters":"'),
        ("mistral", "[TOOL_CALLS][{"),
        ("mistral", "[TOOL_CALLS]f{"),
        ("lfm2", "<|tool_call_start|>[f("),
        ("pythonic", "<function_calls>f("),
        ("kimi_k2", "<|tool_call_begin|>f:0<|tool_call_argument_begin|>{"),
        ("hunyuan", "<tool_calls>[{"),
        ("harmony", "<|channel|>commentary to=f<|message|>{"),
        ("minimax_m2", '<minimax:tool_call><invoke name="f"><parameter name="a">'),
    ],
)
def test_the_rest_after_many_malformed_calls_is_one_that_says_so(name: str, beginning: str) -> None:
    turn = SampledText(beginning * 1000)
    *each, rest = load_format(name).parse(turn).malformed_calls
    assert len(each) == MOST_MALFORMED and LIMIT in rest.reason
    assert not any(LIMIT in call.reason for call in each)
    assert turn.text.endswith(rest.text) and len(rest.text) > len(turn) // 2


def test_what_was_read_before_the_limit_is_kept() -> None:
    parsed = load_format("hermes").parse(SampledText(f"Before {CALL}{BROKEN * 80}{CALL} after"))
    assert (len(parsed.tool_calls), parsed.text, len(parsed.malformed_calls)) == (1, "Before", MOST_MALFORMED + 1)


def test_calls_after_as_many_malformed_ones_as_are_read_are_read() -> None:
    parsed = load_format("hermes").parse(SampledText(f"{BROKEN * MOST_MALFORMED}{CALL} after"))
    assert (len(parsed.tool_calls), parsed.text, len(parsed.malformed_calls)) == (1, "after", MOST_MALFORMED)
    assert not any(LIMIT in call.reason for call in parsed.malformed_calls)


def test_a_value_is_skipped_only_while_the_turn_was_not_scanned_too_often() -> None:
    turn = SampledText("<tool_call>{x" * MOST_MALFORMED + "y" * 10_000)
    assert len(load_format("hermes").parse(turn).malformed_calls) == MOST_MALFORMED
    assert MOST_SCANNED * len(turn) < turn.scanned <= (MOST_SCANNED + 1) * len(turn)
