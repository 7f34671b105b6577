"""The format of the example package in docs/tool_formats.md: it reads calls and reports faults."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from agentloop.chat.sampled import SampledText


@pytest.fixture(scope="module")
def brackets(repo: Path) -> Any:
    path = repo / "tests" / "example_package" / "src" / "bracket_calls.py"
    spec = importlib.util.spec_from_file_location("bracket_calls", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BracketFormat()


def test_it_reads_calls_and_the_text_around_them(brackets: Any) -> None:
    parsed = brackets.parse(SampledText('First [[add {"a": [1, "]]"]}]] then [[stop {}]]'))
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == [("add", {"a": [1, "]]"]}), ("stop", {})]
    assert (parsed.text, parsed.malformed_calls) == ("First  then", [])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[[add {"a": 1', "cut off before ]]"),
        ("[[add]]", "no JSON object"),
        ('[[add {"a": 1} more]]', "text after the call"),
    ],
)
def test_it_says_what_is_wrong(brackets: Any, text: str, reason: str) -> None:
    [fault] = brackets.parse(SampledText(text)).malformed_calls
    assert reason in fault.reason


def test_the_documentation_shows_this_format(repo: Path) -> None:
    source = (repo / "tests" / "example_package" / "src" / "bracket_calls.py").read_text(encoding="utf-8")
    shown = (repo / "docs" / "tool_formats.md").read_text(encoding="utf-8")
    body = source[source.index("        begin = ") :].strip()
    assert body in shown
