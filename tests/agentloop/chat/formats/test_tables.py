"""Turns of each format as its models write them, right and wrong, against what must be read."""

from __future__ import annotations

import pytest

from agentloop.chat.formats import FORMATS
from tests.agentloop.chat.formats.tables import block_calls, json_calls, named_calls, tagged_calls
from tests.agentloop.chat.formats.tables.cases import TOOLS, Case, marked

TABLES = {**json_calls.TABLES, **named_calls.TABLES, **block_calls.TABLES, **tagged_calls.TABLES}
CONTROLS = {**json_calls.CONTROLS, **named_calls.CONTROLS, **block_calls.CONTROLS, **tagged_calls.CONTROLS}
CASES = [pytest.param(name, case, id=f"{name}: {case.title}") for name, cases in TABLES.items() for case in cases]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_turn_is_read_as_the_table_says(name: str, case: Case) -> None:
    parsed = FORMATS[name.partition(" ")[0]].parse(marked(case.text, CONTROLS[name]), TOOLS)
    read = [(call.name, call.arguments) for call in parsed.tool_calls]
    assert repr(read) == repr(list(case.calls))  # as text, because True equals 1
    assert parsed.text == case.said
    assert parsed.reasoning == case.thought
    assert len(parsed.malformed_calls) == len(case.faults)
    for malformed, reason in zip(parsed.malformed_calls, case.faults, strict=True):
        assert reason in malformed.reason
        assert malformed.reason
    if case.ids:
        assert tuple(call.id for call in parsed.tool_calls) == case.ids


@pytest.mark.parametrize("name", TABLES)
def test_each_table_is_large_enough(name: str) -> None:
    titles = [case.title for case in TABLES[name]]
    assert len(titles) >= 25 or " " in name  # a variant has the table of its format besides
    assert len(set(titles)) == len(titles)
