"""Every format: calls are read as they were written, a cut turn adds none, and nothing raises."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentloop.chat.formats import FORMATS
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn

Calls = list[tuple[str, dict[str, Any]]]
Pieces = list[str]
"""Parts of a turn; those in CONTROLS were sampled as control tokens."""

CONTROLS = frozenset(
    re.findall(
        r"\S+",
        """
        <tool_call> </tool_call> <think> </think> <arg_key> </arg_key> <arg_value> </arg_value> <|python_tag|>
        [TOOL_CALLS] [ARGS] [CALL_ID] [THINK] [/THINK]
        <|start|> <|channel|> <|constrain|> <|message|> <|end|> <|call|> <|return|>
        <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜>
        <|tool_call_start|> <|tool_call_end|> <|START_ACTION|> <|END_ACTION|> <|START_THINKING|> <|END_THINKING|>
        <|START_RESPONSE|> <|END_RESPONSE|>
        """,
    )
)
PLAIN = ["<function=", "</function>", "<parameter=", "</parameter>", "```", "Action: ```json\n[", "to=functions.f "]


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def between(pieces: Iterable[Pieces], separator: Pieces) -> Pieces:
    return [part for i, piece in enumerate(pieces) for part in (*(separator if i else []), *piece)]


def raw(value: Any) -> str:
    return value if isinstance(value, str) else dumped(value)


def hermes(calls: Calls) -> Pieces:
    return between(
        (["<tool_call>", f"\n{dumped({'name': n, 'arguments': a})}\n", "</tool_call>"] for n, a in calls), ["\n"]
    )


def qwen3_coder(calls: Calls) -> Pieces:
    def body(arguments: dict[str, Any]) -> str:
        return "".join(f"<parameter={key}>\n{raw(value)}\n</parameter>\n" for key, value in arguments.items())

    return between(
        (["<tool_call>", f"\n<function={n}>\n{body(a)}</function>\n", "</tool_call>"] for n, a in calls), ["\n"]
    )


def glm45(calls: Calls) -> Pieces:
    pieces: Pieces = ["\n"]
    for name, arguments in calls:
        pieces += ["<tool_call>", f"{name}\n"]
        for key, value in arguments.items():
            pieces += ["<arg_key>", key, "</arg_key>", "\n", "<arg_value>", raw(value), "</arg_value>", "\n"]
        pieces += ["</tool_call>"]
    return pieces


def llama3_json(calls: Calls) -> Pieces:
    return ["<|python_tag|>", *between(([dumped({"name": n, "parameters": a})] for n, a in calls), ["; "])]


def llama3_json_bare(calls: Calls) -> Pieces:
    return llama3_json(calls)[1:]


def mistral_array(calls: Calls) -> Pieces:
    return ["[TOOL_CALLS]", " " + dumped([{"name": n, "arguments": a, "id": "123456789"} for n, a in calls])]


def mistral_arguments(calls: Calls) -> Pieces:
    return between((["[TOOL_CALLS]", n, "[ARGS]", dumped(a)] for n, a in calls), [])


def mistral_ids(calls: Calls) -> Pieces:
    return between((["[TOOL_CALLS]", n, "[CALL_ID]", "123456789", "[ARGS]", dumped(a)] for n, a in calls), [])


def harmony(calls: Calls) -> Pieces:
    def message(name: str, arguments: Any) -> Pieces:
        header = ["<|channel|>", f"commentary to=functions.{name} ", "<|constrain|>", "json"]
        return [*header, "<|message|>", dumped(arguments), "<|call|>"]

    return between((message(*call) for call in calls), ["<|start|>", "assistant"])


def harmony_recipient_first(calls: Calls) -> Pieces:
    def message(name: str, arguments: Any) -> Pieces:
        header = [f" to=functions.{name}", "<|channel|>", "commentary json"]
        return [*header, "<|message|>", dumped(arguments), "<|call|>"]

    return between((message(*call) for call in calls), ["<|start|>", "assistant"])


def deepseek_v3(calls: Calls) -> Pieces:
    def call(name: str, arguments: Any) -> Pieces:
        body = f"{name}\n```json\n{dumped(arguments)}\n```"
        return ["<｜tool▁call▁begin｜>", "function", "<｜tool▁sep｜>", body, "<｜tool▁call▁end｜>"]

    return ["<｜tool▁calls▁begin｜>", *between((call(*one) for one in calls), ["\n"]), "<｜tool▁calls▁end｜>"]


def deepseek_v3_1(calls: Calls) -> Pieces:
    def call(name: str, arguments: Any) -> Pieces:
        return ["<｜tool▁call▁begin｜>", name, "<｜tool▁sep｜>", dumped(arguments), "<｜tool▁call▁end｜>"]

    return ["<｜tool▁calls▁begin｜>", *between((call(*one) for one in calls), []), "<｜tool▁calls▁end｜>"]


def pythonic(calls: Calls, written: Callable[[Any], str]) -> Pieces:
    def call(name: str, arguments: dict[str, Any]) -> str:
        return f"{name}({', '.join(f'{key}={written(value)}' for key, value in arguments.items())})"

    return ["<|tool_call_start|>", f"[{', '.join(call(*one) for one in calls)}]", "<|tool_call_end|>"]


def lfm2(calls: Calls) -> Pieces:
    return pythonic(calls, repr)


def lfm2_json(calls: Calls) -> Pieces:
    return pythonic(calls, json.dumps)


def cohere(calls: Calls) -> Pieces:
    actions = [{"tool_call_id": str(i), "tool_name": n, "parameters": a} for i, (n, a) in enumerate(calls)]
    return ["<|START_ACTION|>", json.dumps(actions, indent=4, ensure_ascii=False), "<|END_ACTION|>"]


def cohere_fenced(calls: Calls) -> Pieces:
    return ["Action: ```json\n", dumped([{"tool_name": n, "parameters": a} for n, a in calls]), "\n```"]


WRITERS: dict[Callable[[Calls], Pieces], str] = {
    hermes: "hermes",
    qwen3_coder: "qwen3_coder",
    glm45: "glm45",
    llama3_json: "llama3_json",
    llama3_json_bare: "llama3_json",
    mistral_array: "mistral",
    mistral_arguments: "mistral",
    mistral_ids: "mistral",
    harmony: "harmony",
    harmony_recipient_first: "harmony",
    deepseek_v3: "deepseek_v3",
    deepseek_v3_1: "deepseek_v3",
    lfm2: "lfm2",
    lfm2_json: "lfm2",
    cohere: "cohere",
    cohere_fenced: "cohere",
}
every_writer = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
every_format = pytest.mark.parametrize("name", FORMATS)
UNTYPED = (qwen3_coder, glm45)
"""Formats with unescaped strings: closing tags in them end the string, unless they are control
tokens.
"""

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,11}", fullmatch=True)
TEXTS = st.text(max_size=12) | st.builds(
    "".join, st.lists(st.sampled_from([*sorted(CONTROLS), *PLAIN, " ", "\n", "\\", '"', "a"]), max_size=5)
)
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3)
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def sampled(pieces: Iterable[str], known: Iterable[str] = CONTROLS) -> SampledText:
    known, text, controls = frozenset(known), "", {}
    for piece in pieces:
        if piece in known:
            controls[len(text)] = piece
        text += piece
    return SampledText(text, controls, known)


def schemas(calls: Calls) -> list[dict[str, Any]]:
    """Return schemas with the types of the calls' arguments; of both calls if they differ."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, arguments in calls:
        for key, value in arguments.items():
            kinds = found.setdefault(name, {}).setdefault(key, [])
            kinds.append("null" if value is None else TYPES[type(value)])
    return [
        {
            "type": "function",
            "function": {"name": name, "parameters": {"properties": {k: {"type": v} for k, v in arguments.items()}}},
        }
        for name, arguments in found.items()
    ]


def read(write: Callable[[Calls], Pieces], turn: SampledText, calls: Calls) -> ParsedTurn:
    return FORMATS[WRITERS[write]].parse(turn, schemas(calls))


def calls_of(parsed: ParsedTurn) -> str:
    """Return the arguments as text, because True equals 1 in Python."""
    return repr([(call.name, call.arguments) for call in parsed.tool_calls])


def is_ambiguous(calls: Calls) -> bool:
    """Whether bare text cannot express these arguments: closing tags, or a string that looks like a
    number.
    """
    return any(
        re.search(r"</?(parameter|function)[=>]", raw(value))
        or (isinstance(value, str) and len({str(type(a.get(key))) for n, a in calls if n == name and key in a}) > 1)
        for name, arguments in calls
        for key, value in arguments.items()
    )


@every_writer
@given(calls=CALLS)
@settings(max_examples=40, deadline=None)
def test_calls_come_back_whatever_tags_their_strings_spell(write: Callable[[Calls], Pieces], calls: Calls) -> None:
    if write in UNTYPED and is_ambiguous(calls):
        return
    parsed = read(write, sampled(write(calls)), calls)
    assert calls_of(parsed) == repr(calls)
    assert (parsed.malformed_calls, parsed.text) == ([], "")


@pytest.mark.parametrize("write", [w for w in WRITERS if w not in UNTYPED], ids=lambda write: write.__name__)
@given(calls=CALLS)
@settings(max_examples=40, deadline=None)
def test_a_string_may_hold_the_closing_tags_without_control_tokens_too(
    write: Callable[[Calls], Pieces], calls: Calls
) -> None:
    parsed = read(write, sampled(write(calls), known=()), calls)
    assert calls_of(parsed) == repr(calls)
    assert not parsed.malformed_calls


@every_writer
@given(calls=CALLS, where=st.floats(0, 1), known=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_cut_turn_invents_no_call(write: Callable[[Calls], Pieces], calls: Calls, where: float, known: bool) -> None:
    if write in UNTYPED and (is_ambiguous(calls) or not known):
        return
    turn = sampled(write(calls), CONTROLS if known else ())
    parsed = read(write, turn.cut(0, int(where * len(turn))), calls)
    assert calls_of(parsed) == repr(calls[: len(parsed.tool_calls)])
    # Without the ids, a tag that a string spells begins another call.
    assert not known or len(parsed.malformed_calls) <= 1


@every_writer
@given(calls=CALLS)
@settings(max_examples=20, deadline=None)
def test_spelled_out_control_tokens_make_no_call(write: Callable[[Calls], Pieces], calls: Calls) -> None:
    pieces = write(calls)
    if CONTROLS.isdisjoint(pieces):
        return  # only text
    text = "".join(pieces)
    parsed = read(write, SampledText(text, {}, CONTROLS), calls)
    assert parsed == ParsedTurn(text.strip())


@every_writer
@given(calls=CALLS, before=st.sampled_from(["", "Well. ", "a\nb"]), thought=st.sampled_from(["", "Hm.", "\nHm\n"]))
@settings(max_examples=20, deadline=None)
def test_calls_in_reasoning_are_none_and_text_before_a_call_is_kept(
    write: Callable[[Calls], Pieces], calls: Calls, before: str, thought: str
) -> None:
    name = WRITERS[write]
    if name == "harmony" or write in (llama3_json_bare, cohere_fenced) or (write in UNTYPED and is_ambiguous(calls)):
        return  # they have their own tests
    opening, closing = FORMATS[name].reasoning_tags  # type: ignore[attr-defined]
    pieces = [opening, thought, *write(calls), closing, before, *write(calls)]
    parsed = read(write, sampled(pieces), calls)
    assert calls_of(parsed) == repr(calls)
    assert parsed.text == before.strip()
    assert parsed.reasoning == (thought + "".join(write(calls))).strip()
    begun = FORMATS[name].parse(sampled(pieces[1:]), schemas(calls), reasoning_open=True)
    assert begun == parsed


SNIPPETS = [
    *sorted(CONTROLS),
    *PLAIN,
    *"{}[]()=,:;\"'\\ \n",
    '{"name": "f", ',
    '"arguments": {}',
    "f(a=1",
    "NaN",
    "1e999",
]


@every_format
@given(
    pieces=st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=5), max_size=20),
    known=st.sets(st.sampled_from(sorted(CONTROLS))),
    reasoning_open=st.booleans(),
    with_tools=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_nothing_a_model_writes_raises(
    name: str, pieces: list[str], known: set[str], reasoning_open: bool, with_tools: bool
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}]
    turn = sampled(pieces, known)
    parsed = FORMATS[name].parse(turn, tools if with_tools else None, reasoning_open=reasoning_open)
    assert all(call.reason for call in parsed.malformed_calls)
    for call in parsed.tool_calls:
        assert isinstance(call.name, str)
        json.dumps(call.arguments, allow_nan=False).encode()


@every_format
@pytest.mark.parametrize("text", ["", " \n", "Yes.", "It is {x} and [y](z).", "1; 2", "a <b> c"])
def test_a_turn_without_calls_is_its_text(name: str, text: str) -> None:
    assert FORMATS[name].parse(SampledText(text, {}, CONTROLS)) == ParsedTurn(text.strip())
