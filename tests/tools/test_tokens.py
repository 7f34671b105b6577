"""Tokens are estimated in linear time, and texts are cut by the estimate."""

from __future__ import annotations

import pytest

from tools.tokens import cut_end, cut_middle, estimated_tokens


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("Hello, world 2024!", 6),
        ("a\n\nb\n", 5),
        ("if x:\n    y = 12345", 9),
        ("1" * 9, 3),
        ("é" * 4, 4),
    ],
)
def test_words_numbers_marks_and_line_ends_count(text: str, count: int) -> None:
    assert estimated_tokens(text) == count


def test_the_end_is_cut() -> None:
    assert cut_end("a b c d", 2) == "a b ..."
    assert cut_end("a b", 2) == "a b"


def test_a_long_text_keeps_both_ends() -> None:
    text = "\n".join(f"line {number}" for number in range(1000))
    cut = cut_middle(text, 60)
    assert cut.startswith("line 0\n") and cut.endswith("line 999") and "[cut: about" in cut
    assert len(cut) < 500 and estimated_tokens(cut) < 80
    assert cut_middle("short", 60) == "short"
    assert "[cut" in cut_middle("x" * 10_000, 60), "without line ends"
    assert cut_middle("", 2) == ""


@pytest.mark.parametrize("character", ["a", " ", "\n", "1", "é", "\t", ".", " \n", "\x0b"])
def test_a_million_equal_characters_take_no_time_that_grows_with_their_square(character: str) -> None:
    """A quadratic pattern takes many minutes; white space alone is bounded as text is."""
    text = character * (1_000_000 // len(character))
    assert 0 < estimated_tokens(text) <= 1_000_000
    assert len(cut_end(text, 10)) < 200 and len(cut_middle(text, 10)) < 300
