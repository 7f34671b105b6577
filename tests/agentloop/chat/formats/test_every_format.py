"""Every format: calls come back as they were written, a cut or spoiled turn invents none, and nothing
raises. The shapes write the calls; AGENTLOOP_FUZZ_EXAMPLES sets the number of mutated ones.
"""

from __future__ import annotations

import json
import os
import random
from typing import Any

import pytest

from agentloop.chat.formats import FORMATS
from agentloop.chat.sampled import SampledText
from agentloop.types import ParsedTurn
from tests.agentloop.chat.formats.shapes.every import SHAPES
from tests.agentloop.chat.formats.support import (
    FOREIGN,
    Calls,
    Pieces,
    Shape,
    random_calls,
    random_text,
    random_value,
    reasoning_tags,
    same,
    sampled,
    schemas,
)

MUTATED = int(os.environ.get("AGENTLOOP_FUZZ_EXAMPLES", "500"))
"""Mutated calls for each shape."""

ROUND_TRIPS = max(MUTATED // 10, 200)
"""Random calls for each shape that must come back."""

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_format = pytest.mark.parametrize("name", FORMATS)
quoting_shape = pytest.mark.parametrize("shape", [s for s in SHAPES if s.language != "text" and s.quoting], ids=str)
announced_shape = pytest.mark.parametrize("shape", [s for s in SHAPES if s.announced], ids=str)

REASONING = [shape for shape in SHAPES if shape.announced and reasoning_tags(shape.format)]
"""Shapes of formats with tags around their reasoning."""

reasoning_shape = pytest.mark.parametrize("shape", REASONING, ids=str)


def tags_of(shape: Shape) -> list[str]:
    return sorted({*FORMATS[shape.format].tags, *reasoning_tags(shape.format)})  # type: ignore[attr-defined]


def calls_for(shape: Shape, seed: int, tags: bool = True) -> Calls:
    """Return random calls that the shape can express; their strings spell tags if `tags`.

    Bare text cannot contain those tags of its grammar that are ordinary text.
    """
    rng = random.Random(seed)
    spelled = tags_of(shape)
    if shape.language == "text":
        spelled = [tag for tag in spelled if tag in shape.controls]
    return random_calls(rng, spelled if tags else (), most=3 if shape.several else 1)


@every_shape
def test_calls_come_back_whatever_tags_their_strings_spell(shape: Shape) -> None:
    for seed in range(ROUND_TRIPS):
        calls = calls_for(shape, seed)
        parsed = shape.parse(shape.pieces(calls), schemas(calls))
        assert same(parsed, calls), (seed, calls, parsed)
        assert (parsed.malformed_calls, parsed.text) == ([], ""), (seed, parsed)


@quoting_shape
def test_a_string_may_spell_the_tags_where_none_is_a_control_token(shape: Shape) -> None:
    for seed in range(ROUND_TRIPS // 4):
        calls = calls_for(shape, seed)
        parsed = FORMATS[shape.format].parse(sampled(shape.pieces(calls), ()), schemas(calls))
        assert same(parsed, calls), (seed, calls, parsed)
        assert not parsed.malformed_calls, (seed, parsed)


@pytest.mark.parametrize(
    ("shape", "known"),
    [
        pytest.param(shape, known, id=f"{shape}-{known}")
        for shape in SHAPES
        for known in (True, False)
        if known or (shape.language != "text" and shape.quoting)  # bare text cannot spell its tags
    ],
)
def test_a_cut_turn_invents_no_call(shape: Shape, known: bool) -> None:
    for seed in range(ROUND_TRIPS // 2):
        calls = calls_for(shape, seed)
        pieces = shape.pieces(calls)
        turn = shape.turn(pieces) if known else sampled(pieces, ())
        where = random.Random(seed).randrange(len(turn) + 1)
        parsed = FORMATS[shape.format].parse(turn.cut(0, where), schemas(calls))
        assert same(parsed, calls[: len(parsed.tool_calls)]), (seed, where, parsed)
        # Without the ids, a tag that a string spells begins another call.
        assert not known or not shape.controls or len(parsed.malformed_calls) <= 1, (seed, where, parsed)


MARKS = ("alpha", "bravo", "carol")
EDITS = "{}[]()\"'\\,:=\n<>/ 0a"


def mutated(shape: Shape, pieces: Pieces, rng: random.Random) -> Pieces:
    """Return the turn with one or two faults: pieces that are missing, doubled, cut or interrupted by
    a control token, and a character that is wrong.
    """
    given, pieces = pieces, list(pieces)
    controls = [*sorted(shape.controls), FOREIGN]
    texts = [i for i, piece in enumerate(pieces) if piece not in shape.controls and piece]
    if texts and rng.random() < 0.5:
        at = rng.choice(texts)
        place, edit = rng.randrange(len(pieces[at])), rng.choice(EDITS)
        before, after = pieces[at][:place], pieces[at][place:]
        pieces[at] = rng.choice((before + after[1:], before + edit + after, before + edit + after[1:]))
        if rng.random() < 0.5:
            return pieces

    for _ in range(rng.randrange(1, 3)):
        at = rng.randrange(len(pieces)) if pieces else 0
        kind = rng.randrange(6)
        if kind <= 1:
            del pieces[at : at + 1]
        elif kind == 2:
            pieces[at:at] = pieces[at : at + 1]
        elif kind == 3:
            pieces.insert(at, rng.choice(controls))
        elif kind == 4 and pieces:
            place = rng.randrange(len(pieces[at]) + 1)
            if pieces[at] not in controls:
                pieces[at : at + 1] = [pieces[at][:place], rng.choice(controls), pieces[at][place:]]
        else:
            pieces = pieces[:at] if rng.random() < 0.7 else pieces[at:]
    lost = sum(piece.startswith(shape.bounds) for piece in given) - sum(p.startswith(shape.bounds) for p in pieces)
    return given if shape.bounds and lost > 1 else pieces


@every_shape
def test_a_spoiled_turn_mixes_no_calls_and_no_control_tokens_into_values(shape: Shape) -> None:
    tags = [*tags_of(shape), FOREIGN]
    for seed in range(MUTATED):
        rng = random.Random(seed)
        # The values of each call carry its own mark, and so does its name.
        calls: Calls = [
            (
                f"tool_{mark}",
                {
                    key: f"{mark}{random_text(rng)}{mark}" if rng.random() < 0.7 else {mark: random_value(rng, depth=1)}
                    for key in rng.sample("abcd", rng.randrange(3))
                },
            )
            for mark in MARKS[: rng.randrange(1, 4) if shape.several else 1]
        ]
        pieces = mutated(shape, shape.pieces(calls), rng)
        parsed = shape.parse(pieces, schemas(calls) if rng.random() < 0.8 else None)

        assert all(call.reason for call in parsed.malformed_calls)
        for call in parsed.tool_calls:
            text = json.dumps([call.name, call.arguments], ensure_ascii=False, allow_nan=False)
            text.encode()
            assert not any(tag in text for tag in tags), (seed, pieces, call)
            assert sum(mark in text for mark in MARKS) <= 1, (seed, pieces, call)


@announced_shape
def test_spelled_out_control_tokens_make_no_call(shape: Shape) -> None:
    for seed in range(20):
        pieces = shape.pieces(calls_for(shape, seed))
        if shape.controls.isdisjoint(pieces):
            continue  # only text
        text = "".join(pieces)
        assert FORMATS[shape.format].parse(SampledText(text, {}, shape.controls)) == ParsedTurn(text.strip())


@reasoning_shape
def test_calls_in_reasoning_are_none_and_text_before_a_call_is_kept(shape: Shape) -> None:
    tags = reasoning_tags(shape.format)
    for seed in range(20):
        rng = random.Random(seed)
        calls = calls_for(shape, seed)
        before, thought = rng.choice(("", "Well. ", "a\nb")), rng.choice(("", "Hm.", "\nHm\n"))
        pieces = [tags[0], thought, *shape.pieces(calls), tags[1], before, *shape.pieces(calls)]
        parsed = shape.parse(pieces, schemas(calls))
        assert same(parsed, calls)
        assert parsed.text == before.strip()
        assert parsed.reasoning == (thought + "".join(shape.pieces(calls))).strip()
        begun = FORMATS[shape.format].parse(shape.turn(pieces[1:]), schemas(calls), reasoning_open=True)
        assert begun == parsed


@pytest.mark.parametrize(
    "shape", [shape for shape in REASONING if not shape.controls.isdisjoint(shape.pieces([("f", {})]))], ids=str
)
def test_a_call_in_reasoning_that_is_never_closed_is_reported(shape: Shape) -> None:
    tags = reasoning_tags(shape.format)
    parsed = shape.parse([tags[0], "Hm. ", *shape.pieces([("f", {"a": "x"})])], None)
    assert (parsed.tool_calls, parsed.text) == ([], "")
    assert [tags[1] in call.reason for call in parsed.malformed_calls] == [True]


SNIPPETS = [
    *sorted({tag for shape in SHAPES for tag in tags_of(shape)}),
    *("```", "Action: ```json\n[", "to=functions.f "),
    *"{}[]()=,:;\"'\\ \n",
    '{"name": "f", ',
    '"arguments": {}',
    "f(a=1",
    "NaN",
    "1e999",
]


@every_format
def test_nothing_a_model_writes_raises(name: str) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}]
    for seed in range(200):
        rng = random.Random(seed)
        pieces = [rng.choice(SNIPPETS) if rng.random() < 0.8 else random_text(rng) for _ in range(rng.randrange(20))]
        known = rng.sample(SNIPPETS, rng.randrange(len(SNIPPETS)))
        parsed = FORMATS[name].parse(
            sampled(pieces, known), tools if rng.random() < 0.5 else None, reasoning_open=rng.random() < 0.3
        )
        assert all(call.reason for call in parsed.malformed_calls)
        for call in parsed.tool_calls:
            assert isinstance(call.name, str)
            json.dumps(call.arguments, allow_nan=False).encode()


@every_format
@pytest.mark.parametrize("tools", [[{}], [{"function": None}], [{"function": {"name": "f", "parameters": None}}]])
def test_odd_schemas_raise_nothing(name: str, tools: list[dict[str, Any]]) -> None:
    for shape in SHAPES:
        if shape.format == name:
            parsed = shape.parse(shape.pieces([("f", {"a": "x"})]), tools)
            assert same(parsed, [("f", {"a": "x"})])


@every_format
@pytest.mark.parametrize("text", ["", " \n", "Yes.", "It is {x} and [y](z).", "1; 2", "a <b> c"])
def test_a_turn_without_calls_is_its_text(name: str, text: str) -> None:
    controls = {tag for shape in SHAPES for tag in shape.controls}
    assert FORMATS[name].parse(SampledText(text, {}, controls)) == ParsedTurn(text.strip())
