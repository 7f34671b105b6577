"""`agentloop tools`: the tools of a YAML or a recipe, and calls of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from agentloop.commands.main import build_app
from agentloop.errors import ConfigError, DataError, ToolError

TOOL = """
from agentloop import Tool, ToolResult
from agentloop.errors import ToolError

class Counter(Tool):
    async def open(self, task, start=0):
        return {"n": start, "images": task.images}
    async def execute(self, state, arguments):
        if arguments.get("by") == 0:
            raise ToolError("it is broken", final=True)
        state["n"] += arguments.get("by", 1)
        if arguments.get("seen"):
            from agentloop.images import open_image
            return ToolResult(" ".join(str(open_image(image).size) for image in state["images"]))
        if arguments.get("shown"):
            from PIL import Image
            return ToolResult("shown", images=[Image.new("RGB", (4, 3))])
        return ToolResult(str(state["n"]))
    async def reward(self, state):
        return float(state["n"])
"""
SCHEMA = (
    "{name: count, description: Count., parameters: {properties: {by: {type: integer}, shown: {type: boolean}, "
    "seen: {type: boolean}}}}"
)


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(TOOL)
    path = tmp_path / "tools.yaml"
    path.write_text(f"tools: [{{class_name: './mine.py:Counter', tool_schema: {{function: {SCHEMA}}}}}]")
    return path


HOSTILE = "exe\\u202egnp \\x1b]0;title\\x07"
RAISES = f'''
from agentloop import Tool
from agentloop.errors import ToolError

class Broken(Tool):
    async def execute(self, state, arguments):
        raise ToolError("{HOSTILE}", final=True) if arguments else ValueError("{HOSTILE}")
'''


@pytest.mark.parametrize("arguments", ["{}", '{"by": 1}'])
def test_what_an_exception_holds_is_shown_and_not_done(tmp_path: Path, arguments: str) -> None:
    (tmp_path / "raises.py").write_text(RAISES)
    (tmp_path / "tools.yaml").write_text(
        f"tools: [{{class_name: './raises.py:Broken', tool_schema: {{function: {SCHEMA}}}}}]"
    )
    done = subprocess.run(
        [sys.executable, "-m", "agentloop.commands.main", "tools", "call", "count", arguments, "-t", "tools.yaml"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "exe⟨U+202E⟩gnp" in said and not {"\u202e", "\x1b", "\x07"} & set(said)


def run(*words: str | Path, fails: bool = False) -> Result:
    result = CliRunner().invoke(build_app(), ["tools", *map(str, words)])
    assert fails or result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_tools_are_listed_and_shown(yaml: Path) -> None:
    listed = run("list", "--tools", yaml).stdout
    assert "count(by, shown, seen)  Count." in listed and "./mine.py:Counter (tool 1 of " in listed
    assert json.loads(run("show", "count", "-t", yaml).stdout)["function"]["description"] == "Count."


def test_a_call_is_that_of_an_episode(yaml: Path, tmp_path: Path) -> None:
    result = run(
        "call", "count", '{"by": "2"}', "-t", yaml, "--row", '{"create_kwargs": {"start": 5}}', "--repeat", "2"
    )
    assert result.stdout == "7\n9\n" and result.exit_code == 0
    assert "converted_arguments 1" in result.stderr and "reward of count: 9" in result.stderr
    wrong = run("call", "count", '{"bi": 2}', "-t", yaml)
    assert (
        wrong.exit_code == 1
        and wrong.stdout == "Error: count has no argument 'bi'; its arguments are: by, shown, seen\n"
    )
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
        (["call", "count", "{}", "--row", "5"], ConfigError, "--row is not a JSON object\n  fix: it takes what a row"),
        (["call", "count", "{}", "--row", "{"], ConfigError, "--row is not JSON"),
        (["call", "count", "{}", "--row", '{"create_kwargs": ["x"]}'], DataError, "--row, key 'create_kwargs' is not"),
        (["call", "count", "{}", "--row", '{"create_kwarg": {}}'], DataError, "did you mean 'create_kwargs'?"),
        (["call", "count", "{}", "--row", '{"other": {}}'], DataError, "--row has the key 'other'"),
        (["call", "count", "{}", "--row", '{"images": ["a.png"]}'], DataError, "with --image FILE"),
        (["call", "count", "{}", "--image", "none.png"], DataError, "none.png: No such file or directory"),
        (["call", "count", "{}", "--image", __file__], DataError, f"--image {__file__}: cannot read an image"),
        (["call", "count", '{"by": 0}'], ToolError, "it is broken"),
    ],
)
def test_what_is_wrong_is_named(yaml: Path, words: list[str], error: type[Exception], says: str) -> None:
    exception = run(*words, "-t", yaml, fails=True).exception
    assert isinstance(exception, error) and says in str(exception)
    both = run("list", fails=True).exception
    assert isinstance(both, ConfigError) and "either --tools or --config" in str(both)


def test_images_are_given_to_a_tool_as_those_of_a_row(
    yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (50, 60)).save(tmp_path / "b.jpg")
    monkeypatch.chdir(tmp_path)
    given = ["--image", "a.png", "--image", tmp_path / "b.jpg"]
    assert run("call", "count", '{"seen": true}', "-t", yaml, *given).stdout == "(40, 30) (50, 60)\n"

    box = '{"bbox_2d": [0, 0, 20, 20], "img_idx": 1}'
    path = tmp_path / "zoom.yaml"
    path.write_text("tools: [{class_name: tools.image.ImageZoomIn}]")
    zoomed = run("call", "image_zoom_in", box, "-t", path, *given)
    assert zoomed.exit_code == 0 and "of image 1, which has 50 x 60 pixels" in zoomed.stdout


def test_a_tool_that_does_not_open_is_explained_without_a_row(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from agentloop import Tool, ToolResult\nfrom agentloop.errors import ToolError\n\nclass First(Tool):\n"
        "    async def open(self, task, refuse=False):\n        if refuse:\n"
        "            raise ToolError('no index', final=True)\n        return task.images[0]\n"
        "    async def execute(self, state, arguments):\n        return ToolResult('')\n"
    )
    path = tmp_path / "tools.yaml"
    path.write_text("tools: [{class_name: './mine.py:First', tool_schema: {function: {name: first}}}]")
    given = "what a row holds is given with --image FILE and --row JSON"
    assert str(run("call", "first", "-t", path, fails=True).exception) == (
        f"first could not be opened: IndexError: list index out of range\n  fix: see {tmp_path / 'mine.py'}:8; {given}"
    )
    own = run("call", "first", "-t", path, "--row", '{"create_kwargs": {"refuse": true}}', fails=True).exception
    assert isinstance(own, ToolError) and own.message == "no index" and own.__notes__ == [f"  {given}"]
