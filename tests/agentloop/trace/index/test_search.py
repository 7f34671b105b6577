"""A reader's words never become syntax of the full-text search."""

from __future__ import annotations

import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentloop.trace.index.schema import SEARCHED, STATEMENTS
from agentloop.trace.index.search import SearchError, match_expression, searchable


@pytest.mark.parametrize(
    ("search", "expression"),
    [
        ("two", '("two" *)'),
        ("to", '("to")'),
        ("two ", '("two")'),
        ("two words", '("two" AND "words" *)'),
        ('"two words"', '("two words")'),
        ('"open', '("open")'),
        ("wor* end ", '("wor" * AND "end")'),
        ("a -b", '("a") NOT "b"'),
        ("tool:search x ", '({calls} : "search" AND "x")'),
        ("http://host ", '("http://host")'),
        ("NOT near ", '("NOT" AND "near")'),
    ],
)
def test_words_become_an_expression(search: str, expression: str) -> None:
    assert match_expression(search) == expression


@pytest.mark.parametrize("search", ["", "  ", "...", "-only", '""', "+++ ***", "_"])
def test_a_search_without_a_word_is_refused(search: str) -> None:
    with pytest.raises(SearchError):
        match_expression(search)


def words() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.execute(next(statement for statement in STATEMENTS if "fts5" in statement))
    return connection


@given(st.text(max_size=60))
def test_any_text_is_a_valid_expression_or_refused(search: str) -> None:
    connection = words()
    try:
        expression = match_expression(search)
    except SearchError:
        return
    connection.execute("SELECT rowid FROM words WHERE words MATCH ?", (expression,)).fetchall()


@given(st.text(alphabet="abcäß漢字かなไทย '\"-*:(){}", min_size=1, max_size=30))
def test_a_text_is_found_by_itself(text: str) -> None:
    connection = words()
    columns = ", ".join(SEARCHED)
    connection.execute(f"INSERT INTO words (rowid, {columns}) VALUES (1, ?, '', '', '', '')", (searchable(text),))  # noqa: S608
    try:
        expression = match_expression('"' + text.replace('"', " ") + '"')
    except SearchError:
        return
    found = connection.execute("SELECT rowid FROM words WHERE words MATCH ?", (expression,)).fetchall()
    assert found == [(1,)]


def test_a_part_of_a_sentence_without_spaces_is_found() -> None:
    connection = words()
    columns = ", ".join(SEARCHED)
    text = searchable("答えは四十二です。終わり")
    connection.execute(f"INSERT INTO words (rowid, {columns}) VALUES (1, '', ?, '', '', '')", (text,))  # noqa: S608
    for search, found in (("四十二", 1), ("十四", 0), ("answer:終", 1), ("prompt:終", 0)):
        rows = connection.execute("SELECT rowid FROM words WHERE words MATCH ?", (match_expression(search),)).fetchall()
        assert len(rows) == found, search
