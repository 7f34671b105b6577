"""Passages as the model reads them: the established form, and cuts by documents and tokens."""

from __future__ import annotations

from typing import Any

import pytest

from agentloop.errors import ToolError
from tools.search.text import read_result, show_passages
from tools.tokens import estimated_tokens


def test_the_established_form() -> None:
    found = [["Pavia Cathedral\nBegun in 1488.", "Other\nline one\nline two"]]
    text, shown = show_passages(["q"], found)
    assert text == "Doc 1 (Title: Pavia Cathedral)\nBegun in 1488.\n\nDoc 2 (Title: Other)\nline one\nline two"
    assert shown == 2


def test_several_queries_are_told_apart() -> None:
    text, shown = show_passages(["first", "second"], [["T\na"], []])
    assert text == "Query: first\nDoc 1 (Title: T)\na\n---\nQuery: second\nNo document was found."
    assert shown == 1


def test_documents_that_do_not_fit_are_left_out_by_rank_and_counted() -> None:
    found = [[f"T{rank}\n" + "word " * 20 for rank in range(3)] for _ in range(2)]
    text, shown = show_passages(["a", "b"], found, most_tokens=100)
    assert shown == 3
    assert text.count("Doc 1") == 2 and text.count("Doc 2") == 1
    assert "[cut: 1 further documents do not fit]" in text and "[cut: 2 further documents do not fit]" in text
    assert estimated_tokens(text) < 140


def test_the_first_document_is_cut_rather_than_left_out() -> None:
    text, shown = show_passages(["q"], [["T\n" + "word " * 500]], most_tokens=50)
    assert shown == 1 and text.endswith(" ...") and 40 <= estimated_tokens(text) <= 55


def test_each_document_may_be_cut() -> None:
    text, _ = show_passages(["q"], [["T\n" + "word " * 500] * 2], most_document_tokens=10)
    assert text.count("word") == 20 and text.count("...") == 2


@pytest.mark.parametrize(
    "document",
    [
        {"document": {"contents": "T\nx", "id": "1"}, "score": 0.5},
        {"contents": "T\nx"},
        {"document": {"title": "T", "text": "x"}},
        {"document": "T\nx", "score": 1},
        "T\nx",
    ],
)
def test_answers_of_other_servers_are_read(document: Any) -> None:
    assert read_result({"result": [[document], []]}, 2) == [["T\nx"], []]


@pytest.mark.parametrize(
    "answer",
    [None, [], {}, {"result": None}, {"result": [[]]}, {"result": ["a", "b"]}, {"result": [[{"document": 5}], []]},
     {"result": [[{"document": {"contents": None}}], []]}, {"result": [[7], []]}],
)  # fmt: skip
def test_an_answer_of_another_form_is_a_fault_of_the_service(answer: Any) -> None:
    with pytest.raises(ToolError, match="cannot be read") as caught:
        read_result(answer, 2)
    assert caught.value.final
