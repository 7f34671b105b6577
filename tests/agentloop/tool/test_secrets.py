"""Secrets of a tool YAML reach the tool, and neither the model nor an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentloop.errors import ToolConfigError, ToolError
from agentloop.tool.loading import load_toolset
from agentloop.tool.secrets import resolved
from agentloop.types import Task, ToolCall

TOOL = """
from agentloop import Tool, ToolResult
from agentloop.errors import ToolError

class Mine(Tool):
    async def execute(self, state, arguments):
        key = self.config["headers"]["Authorization"]
        if arguments["how"] == "tool error":
            raise ToolError(f"refused {key}", "not " + key, final=True)
        if arguments["how"] == "exception":
            raise ValueError(key)
        return ToolResult(f"you sent {key}", error=key if arguments["how"] == "error" else None)
"""
YAML = """
tools:
  - class_name: ./mine.py:Mine
    config: {headers: {Authorization: "Bearer ${oc.env:MY_SERVICE}"}, place: "${oc.env:PLACE,here}", n: 3}
    tool_schema: {type: function, function: {name: t, parameters: {properties: {how: {type: string}}}}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(TOOL)
    (tmp_path / "tools.yaml").write_text(YAML)
    return tmp_path


@pytest.mark.parametrize("key", ["Authorization", "X-Api-Key", "api_key", "service.apikey", "X-Token"])
def test_a_value_that_stands_in_the_file_is_a_secret_by_its_key(key: str) -> None:
    config = {"headers": {key: "s3cret-value", "Accept": "application/json"}}
    assert resolved(config, "tool 1") == (config, ("s3cret-value",))


async def test_no_answer_and_no_error_shows_a_secret(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE", "s3cret-value")
    toolset = load_toolset(folder / "tools.yaml")
    config: dict[str, Any] = toolset.tools["t"].config
    assert config == {"headers": {"Authorization": "Bearer s3cret-value"}, "place": "here", "n": 3}

    session = toolset.session(Task("0", "a", []))
    assert (await session.call(ToolCall("t", {"how": "text"}), 5)).text == "you sent Bearer (hidden)"
    assert (await session.call(ToolCall("t", {"how": "error"}), 5)).error == "Bearer (hidden)"
    assert (await session.call(ToolCall("t", {"how": "exception"}), 5)).text == "Error: ValueError: Bearer (hidden)"
    assert not session.faults  # they would keep the text of the exception
    with pytest.raises(ToolError, match=r"refused Bearer \(hidden\)") as caught:
        await session.call(ToolCall("t", {"how": "tool error"}), 5)
    assert "s3cret" not in str(caught.value) and caught.value.__cause__ is None and caught.value.__suppress_context__


def test_a_variable_that_is_not_set_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_SERVICE", raising=False)
    with pytest.raises(ToolConfigError, match=r"tool 1: config.headers.Authorization names .* MY_SERVICE, which"):
        load_toolset(folder / "tools.yaml")


def test_an_error_of_the_config_hides_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE", "s3cret-value")
    text = YAML.replace("./mine.py:Mine", "tools.search.SearchTool").replace("n: 3", "retrieval_service_url: '$u'")
    (folder / "tools.yaml").write_text(text.replace("$u", "x ${oc.env:MY_SERVICE}"))
    with pytest.raises(ToolConfigError) as caught:
        load_toolset(folder / "tools.yaml")
    assert "s3cret" not in str(caught.value) and "(hidden)" in str(caught.value)
