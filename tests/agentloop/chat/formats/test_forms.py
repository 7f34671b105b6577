"""One table of right and wrong forms, for all formats alike: docs/tool_formats.md, "What is read"."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from agentloop.chat.formats import FORMATS
from tests.agentloop.chat.formats.shapes.every import SHAPES
from tests.agentloop.chat.formats.support import FOREIGN, Calls, Pieces, Shape, same

TYPES = {"a": "string", "n": "integer", "x": "number", "b": "boolean", "o": "object", "l": "array", "z": "null"}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"properties": {key: {"type": TYPES[key]} for key in TYPES}}},
    }
    for name in ("f", "g", "h")
]


class Form(NamedTuple):
    """A turn, and what must be read from it.

    Attributes:
        pieces: the turn.
        calls: the calls that it contains.
        reasons: a pattern for the reason of each malformed call.
        text: the text around the calls; None: it does not matter.
    """

    pieces: Pieces
    calls: Calls
    reasons: tuple[str, ...] = ()
    text: str | None = ""


FORMS: dict[str, Callable[[Shape], Form | None]] = {}
"""Each form by name; None: a format of this shape cannot be written so."""


def form(build: Callable[[Shape], Form | None]) -> Callable[[Shape], Form | None]:
    FORMS[build.__name__] = build
    return build


def right(shape: Shape, *calls: tuple[str, dict[str, Any]]) -> Form:
    """Calls as the format writes them."""
    return Form(shape.pieces(list(calls)), list(calls))


def spoiled(shape: Shape, key: str, source: str, *, meant: Any, reason: str = "", after: bool = True) -> Form:
    """A call with this source text as a value, and a right call after it.

    Args:
        shape: how the format writes calls.
        key: the argument.
        source: its value; control tokens in it stand between section signs.
        meant: the value that is read, if no reason is given.
        reason: why the call is malformed.
        after: a right call follows.
    """
    good = [("g", [("a", shape.value("y"))])] if after and shape.several else []
    pieces: Pieces = []
    for piece in shape.write([("f", [(key, source)]), *good]):
        pieces += piece.split("§")
    calls: Calls = [("g", {"a": "y"})] if good else []
    if not reason:
        return Form(pieces, [("f", {key: meant}), *calls])
    if FOREIGN in source and shape.listed:
        calls = []  # a control token ends the list
    return Form(pieces, calls, (reason,), None)


@form
def one_call(shape: Shape) -> Form:
    return right(shape, ("f", {"a": "x"}))


@form
def two_calls(shape: Shape) -> Form | None:
    return right(shape, ("f", {"a": "x"}), ("g", {"a": "y"})) if shape.several else None


@form
def the_same_call_twice(shape: Shape) -> Form | None:
    return right(shape, ("f", {"a": "x"}), ("f", {"a": "x"})) if shape.several else None


@form
def without_arguments(shape: Shape) -> Form:
    return right(shape, ("f", {}))


@form
def without_arguments_before_another(shape: Shape) -> Form | None:
    return right(shape, ("f", {}), ("g", {"a": "y"})) if shape.several else None


@form
def a_tool_that_is_not_offered(shape: Shape) -> Form:
    return right(shape, ("other.tool-2", {"q": "x"}))


@form
def every_type(shape: Shape) -> Form:
    return right(shape, ("f", {"a": "x", "n": -7, "x": 0.5, "b": True, "o": {"k": [1, None]}, "l": [], "z": None}))


@form
def an_integer_as_number(shape: Shape) -> Form:
    return right(shape, ("f", {"x": 3}))


@form
def the_largest_integer(shape: Shape) -> Form:
    return right(shape, ("f", {"n": 2**63 - 1}))


@form
def an_empty_string(shape: Shape) -> Form:
    return right(shape, ("f", {"a": ""}))


@form
def quotes_and_backslashes(shape: Shape) -> Form:
    return right(shape, ("f", {"a": "say \"no\" or 'no' to C:\\temp\\new"}))


@form
def unicode_text(shape: Shape) -> Form:
    return right(shape, ("f", {"a": "Zürich 漢字 🙂 \u2028"}))


@form
def lines_in_a_string(shape: Shape) -> Form:
    return right(shape, ("f", {"a": "one\n\n  two\n"}))


@form
def a_string_that_looks_like_json(shape: Shape) -> Form:
    return right(shape, ("f", {"a": '{"n": 07}'}))


@form
def a_string_that_spells_control_tokens(shape: Shape) -> Form:
    tags = [tag for tag in sorted(shape.controls) if not tag.startswith("<function_calls")]
    return right(shape, ("f", {"a": f"a {' '.join(tags)} b"}))


@form
def braces_and_brackets_in_a_string(shape: Shape) -> Form:
    return right(shape, ("f", {"a": "}]) f(a=1) {[("}))


@form
def deep_values(shape: Shape) -> Form:
    value: Any = 1
    for _ in range(20):
        value = {"k": [value]}
    return right(shape, ("f", {"o": value}))


@form
def text_before(shape: Shape) -> Form | None:
    said = "First I look.\n"
    if not shape.announced:
        return None
    return Form([*shape.said(said), *shape.pieces([("f", {"a": "x"})])], [("f", {"a": "x"})], text=said.strip())


@form
def text_after(shape: Shape) -> Form | None:
    return (
        right(shape, ("f", {"a": "x"}))._replace(
            pieces=[*shape.pieces([("f", {"a": "x"})]), "\nThen I wait."], text="Then I wait."
        )
        if shape.text_after
        else None
    )


@form
def the_opening_tag_twice(shape: Shape) -> Form | None:
    if not shape.opening:
        return None
    pieces = shape.pieces([("f", {"a": "x"})])
    at = pieces.index(shape.opening)
    return Form([*pieces[:at], shape.opening, " ", *pieces[at:]], [("f", {"a": "x"})])


@form
def no_closing_tag_at_the_end(shape: Shape) -> Form | None:
    if not shape.closing:
        return None
    pieces = shape.pieces([("f", {"a": "x"})])[: -shape.closing]
    if shape.ends_itself:
        return Form(pieces, [("f", {"a": "x"})])
    return Form(pieces, [], ("cut off",))


@form
def no_closing_tag_before_the_next_call(shape: Shape) -> Form | None:
    if not (shape.closing and shape.several and shape.opening):
        return None
    return Form(
        [*shape.pieces([("f", {"a": "x"})])[: -shape.closing], *shape.pieces([("g", {"a": "y"})])],
        [("f", {"a": "x"}), ("g", {"a": "y"})],
    )


@form
def arguments_as_json_text(shape: Shape) -> Form | None:
    return Form(shape.given("f", '"{\\"a\\": \\"x\\"}"'), [("f", {"a": "x"})]) if shape.given else None


@form
def arguments_as_an_array(shape: Shape) -> Form | None:
    return Form(shape.given("f", "[1]"), [], ("object|name",)) if shape.given else None


@form
def arguments_as_other_text(shape: Shape) -> Form | None:
    return Form(shape.given("f", '"x"'), [], ("object",)) if shape.given else None


@form
def arguments_as_a_python_dict(shape: Shape) -> Form | None:
    return (
        Form(shape.given("f", "{'a': \"it's\", 'b': True}"), [("f", {"a": "it's", "b": True})]) if shape.given else None
    )


@form
def arguments_with_a_trailing_comma(shape: Shape) -> Form | None:
    return Form(shape.given("f", '{"a": "x",}'), [("f", {"a": "x"})]) if shape.given else None


@form
def raw_line_breaks_in_a_string(shape: Shape) -> Form:
    source = "one\n\ttwo" if shape.language == "text" else '"one\n\ttwo"'
    return spoiled(shape, "a", source, meant="one\n\ttwo")


@form
def true_in_python(shape: Shape) -> Form:
    return spoiled(shape, "b", "True", meant=True)


@form
def none_in_python(shape: Shape) -> Form:
    return spoiled(shape, "z", "None", meant=None)


@form
def true_in_json(shape: Shape) -> Form:
    return spoiled(shape, "b", "true", meant=True)


@form
def single_quotes(shape: Shape) -> Form:
    return spoiled(shape, "l", "['it is', 1]", meant=["it is", 1])


@form
def a_leading_zero(shape: Shape) -> Form:
    return spoiled(shape, "n", "07", meant=None, reason="must not begin with 0")


@form
def a_leading_zero_in_a_list(shape: Shape) -> Form:
    return spoiled(shape, "l", "[1, 07]", meant=None, reason="must not begin with 0")


@form
def not_a_number(shape: Shape) -> Form:
    return spoiled(shape, "x", "NaN", meant=None, reason="NaN")


@form
def a_number_that_is_too_large(shape: Shape) -> Form:
    return spoiled(shape, "x", "1e999", meant=None, reason="too large")


@form
def an_integer_of_more_than_64_bits(shape: Shape) -> Form:
    return spoiled(shape, "n", str(2**63), meant=None, reason="64 bits")


@form
def too_deep(shape: Shape) -> Form:
    return spoiled(shape, "l", "[" * 90 + "]" * 90, meant=None, reason="nested")


@form
def half_of_a_surrogate_pair(shape: Shape) -> Form:
    return spoiled(shape, "l", '["\\ud800"]', meant=None, reason="surrogate")


@form
def a_value_that_is_missing(shape: Shape) -> Form:
    return spoiled(shape, "n", "", meant=None, reason=".")


@form
def an_argument_twice(shape: Shape) -> Form:
    value = shape.value("x")
    return Form(shape.write([("f", [("a", value), ("a", value)])]), [], ("given twice",), None)


@form
def a_key_twice_in_an_object(shape: Shape) -> Form:
    return spoiled(shape, "o", '{"k": 1, "k": 2}', meant=None, reason="given twice")


@form
def a_control_token_in_a_string(shape: Shape) -> Form:
    quote = "" if shape.language == "text" else '"'
    return spoiled(shape, "a", f"{quote}one§{FOREIGN}§two{quote}", meant=None, reason=re.escape(FOREIGN))


@form
def a_control_token_in_a_name(shape: Shape) -> Form | None:
    if not shape.announced and shape.language == "python":
        return None  # text
    pieces: Pieces = []
    for piece in shape.write([("f§o", [("a", shape.value("x"))])]):
        before, sign, after = piece.partition("§")
        pieces += [before, FOREIGN, after] if sign else [before]
    return Form(pieces, [], (".",), None)


@form
def cut_within_a_string(shape: Shape) -> Form:
    pieces = shape.pieces([("f", {"a": "§"})])
    at = next(i for i, piece in enumerate(pieces) if "§" in piece)
    return Form([*pieces[:at], pieces[at].partition("§")[0] + "one"], [], ("cut off",), None)


@form
def the_next_call_within_a_string(shape: Shape) -> Form | None:
    if not (shape.several and shape.opening in shape.controls):
        return None
    cut = cut_within_a_string(shape)
    assert cut is not None
    return Form([*cut.pieces, *shape.pieces([("g", {"a": "y"})])], [("g", {"a": "y"})], (".",), None)


@form
def an_opening_tag_alone(shape: Shape) -> Form | None:
    return Form([shape.opening], [], (".",), None) if shape.opening else None


@form
def text_in_place_of_a_call(shape: Shape) -> Form | None:
    if not shape.opening or shape.format in ("mistral", "llama3_json"):
        return None
    pieces = shape.pieces([("f", {})])
    return Form([shape.opening, "I do not know.", *pieces[len(pieces) - shape.closing :]], [], (".",), None)


@form
def no_call(shape: Shape) -> Form:
    said = "It is {x} and [y](z); 1 < 2."
    return Form([said], [], text=said)


EXPECTED = [
    pytest.param(shape, expected, id=f"{name}-{shape}")
    for name, build in FORMS.items()
    for shape in SHAPES
    if (expected := build(shape)) is not None
]


@pytest.mark.parametrize(("shape", "expected"), EXPECTED)
def test_every_form_is_read_or_reported_alike(shape: Shape, expected: Form) -> None:
    parsed = shape.parse(expected.pieces, TOOLS)
    assert same(parsed, expected.calls), parsed
    assert len(parsed.malformed_calls) == len(expected.reasons), parsed
    for call, reason in zip(parsed.malformed_calls, expected.reasons, strict=True):
        assert re.search(reason, call.reason), parsed
    assert expected.text is None or parsed.text == expected.text.strip(), parsed


def test_every_format_has_a_shape() -> None:
    assert {shape.format for shape in SHAPES} == set(FORMATS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_table_has_at_least_25_forms_for_each_format(shape: Shape) -> None:
    assert sum(build(shape) is not None for build in FORMS.values()) >= 25


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tags_of_a_shape_are_those_that_the_format_declares(shape: Shape) -> None:
    tags = FORMATS[shape.format].tags  # type: ignore[attr-defined]
    assert all(any(control in tag for tag in tags) for control in shape.controls)
