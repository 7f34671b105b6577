"""`agentloop tools`: the tools of a YAML or a recipe, and calls of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from agentloop.commands.main import build_app
from agentloop.errors import ConfigError, DataError, ToolError

TOOL = """
from agentloop import Tool, ToolResult
from agentloop.errors import ToolError

class Counter(Tool):
    async def open(self, task, start=0):
        return {"n": start}
    async def execute(self, state, arguments):
        if arguments.get("by") == 0:
            raise ToolError("it is broken", final=True)
        state["n"] += arguments.get("by", 1)
        if arguments.get("shown"):
            from PIL import Image
            return ToolResult("shown", images=[Image.new("RGB", (4, 3))])
        return ToolResult(str(state["n"]))
    async def reward(self, state):
        return float(state["n"])
"""
SCHEMA = "{name: count, description: Count., parameters: {properties: {by: {type: integer}, shown: {type: boolean}}}}"


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(TOOL)
    path = tmp_path / "tools.yaml"
    path.write_text(f"tools: [{{class_name: './mine.py:Counter', tool_schema: {{function: {SCHEMA}}}}}]")
    return path


def run(*words: str | Path, fails: bool = False) -> Result:
    result = CliRunner().invoke(build_app(), ["tools", *map(str, words)])
    assert fails or result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_tools_are_listed_and_shown(yaml: Path) -> None:
    listed = run("list", "--tools", yaml).stdout
    assert "count(by, shown)  Count." in listed and "./mine.py:Counter (tool 1 of " in listed
    assert json.loads(run("show", "count", "-t", yaml).stdout)["function"]["description"] == "Count."


def test_a_call_is_that_of_an_episode(yaml: Path, tmp_path: Path) -> None:
    result = run(
        "call", "count", '{"by": "2"}', "-t", yaml, "--row", '{"create_kwargs": {"start": 5}}', "--repeat", "2"
    )
    assert result.stdout == "7\n9\n" and result.exit_code == 0
    assert "converted_arguments 1" in result.stderr and "reward of count: 9" in result.stderr
    wrong = run("call", "count", '{"bi": 2}', "-t", yaml)
    assert wrong.exit_code == 1 and wrong.stdout == "Error: count has no argument 'bi'; its arguments are: by, shown\n"
    run("call", "count", '{"shown": true}', "-t", yaml, "--images", tmp_path / "images")
    assert len(list((tmp_path / "images").iterdir())) == 1


def test_a_terminal_does_not_do_what_a_tool_says(tmp_path: Path) -> None:
    says = "\\x1b]0;owned\\x07 \\u202ered"
    (tmp_path / "mine.py").write_text(
        f'def say(half: bool = False) -> str:\n    """{says}\n\n    Args:\n        half: Add half a pair.\n    """\n'
        f'    return "{says}" + half * "\\ud800"\n'
    )
    path = tmp_path / "tools.yaml"
    path.write_text("tools: [{class_name: './mine.py:say'}]")
    assert run("call", "say", '{"half": true}', "-t", path).stdout == "\x1b]0;owned\x07 \u202ered?\n"

    ours, terminal = os.openpty()
    try:
        for words in (["list"], ["show", "say"], ["call", "say"]):
            command = [sys.executable, "-m", "agentloop", "tools", *words, "-t", str(path)]
            subprocess.run(command, stdout=terminal, stderr=subprocess.PIPE, check=True)
            shown = os.read(ours, 65536).decode()
            assert "owned" in shown and "\x1b" not in shown and "\u202e" not in shown
    finally:
        os.close(ours)
        os.close(terminal)


def test_a_recipe_gives_limits_and_lengths(repo: Path) -> None:
    result = run("call", "calculator", '{"expression": "6 * 7"}', "-c", repo / "recipes" / "quickstart" / "recipe.yaml")
    assert result.stdout == "42\n" and result.exit_code == 0


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (["call", "coutn", "{}"], ConfigError, "did you mean 'count'"),
        (["call", "count", "{'by': 1}"], ConfigError, "the arguments are not JSON"),
        (["call", "count", "[1]"], ConfigError, "not a JSON object"),
        (["call", "count", "{}", "--row", '{"create_kwargs": {"begin": 1}}'], DataError, "--row"),
        (["call", "count", '{"by": 0}'], ToolError, "it is broken"),
    ],
)
def test_what_is_wrong_is_named(yaml: Path, words: list[str], error: type[Exception], says: str) -> None:
    exception = run(*words, "-t", yaml, fails=True).exception
    assert isinstance(exception, error) and says in str(exception)
    both = run("list", fails=True).exception
    assert isinstance(both, ConfigError) and "either --tools or --config" in str(both)
