"""`SampledText` keeps the positions of its control tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentloop.chat.sampled import SampledText

KNOWN = ("<a>", "<b>")


@st.composite
def sampled(draw: st.DrawFn) -> SampledText:
    """Pieces, each sampled as text or as a control token."""
    text, controls = "", {}
    for piece, is_control in draw(st.lists(st.tuples(st.sampled_from([*KNOWN, "<c>", "x", " ", "\n"]), st.booleans()))):
        if is_control and piece in KNOWN:
            controls[len(text)] = piece
        text += piece
    return SampledText(text, controls, KNOWN)


def places(text: SampledText, tag: str) -> list[int]:
    found, start = [], 0
    while (start := text.find(tag, start)) >= 0:
        found.append(start)
        start += 1
    return found


def test_a_control_token_is_found_where_its_id_was_sampled() -> None:
    text = SampledText("<a> <a> <c>", {4: "<a>"}, KNOWN)
    assert places(text, "<a>") == [4]
    assert places(text, "<b>") == []
    assert places(text, "<c>") == [8]


def test_without_added_tokens_every_tag_is_text() -> None:
    assert places(SampledText("<a><b><a>"), "<a>") == [0, 6]


@pytest.mark.parametrize(("start", "end", "found"), [(0, 3, -1), (0, 4, 1), (1, 4, 1), (2, None, -1), (0, 99, 1)])
@pytest.mark.parametrize("tag", ["<a>", "<c>"])
def test_a_tag_is_found_if_it_is_wholly_inside(tag: str, start: int, end: int | None, found: int) -> None:
    assert SampledText(f"x{tag}y", {1: tag} if tag in KNOWN else {}, KNOWN).find(tag, start, end) == found


def test_the_first_of_several_tags_wins_and_of_two_at_one_place_the_longer() -> None:
    text = SampledText("x <c> <cc> <a>", {11: "<a>"}, KNOWN)
    assert text.find_first(["<a>", "<c>", "<cc>"]) == (2, "<c>")
    assert text.find_first(["<cc", "<cc>", "<a>"]) == (6, "<cc>")
    assert text.find_first(["<b>"]) is None
    assert text.find_first(["<c>", "<a>"], 3) == (11, "<a>")


@given(text=sampled(), start=st.integers(-12, 12), end=st.none() | st.integers(-12, 40))
def test_a_part_knows_the_control_tokens_inside_of_it(text: SampledText, start: int, end: int | None) -> None:
    part = text[start:end]
    low, high, _ = slice(start, end).indices(len(text))
    assert part.text == text.text[start:end]
    for tag in KNOWN:
        assert places(part, tag) == [p - low for p in places(text, tag) if low <= p and p + len(tag) <= high]


@given(sampled())
def test_strip_takes_the_white_space_at_both_ends(text: SampledText) -> None:
    stripped = text.strip()
    assert stripped.text == text.text.strip()
    assert [len(places(stripped, tag)) for tag in KNOWN] == [len(places(text, tag)) for tag in KNOWN]


def test_a_sampled_text_has_no_steps() -> None:
    with pytest.raises(ValueError, match="sliced with a step"):
        SampledText("abc")[::2]


@given(
    text=sampled(), starts=st.lists(st.integers(0, 12), min_size=1, max_size=6), tag=st.sampled_from(["<c>", "x", " "])
)
def test_what_is_found_does_not_depend_on_what_was_looked_for_before(
    text: SampledText, starts: list[int], tag: str
) -> None:
    assert [text.find(tag, start) for start in starts] == [text.text.find(tag, start) for start in starts]
