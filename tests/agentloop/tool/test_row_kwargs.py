"""Arguments that rows give to tools: the tool exists and takes them."""

from __future__ import annotations

from typing import Any

import pytest

from agentloop.errors import DataError
from agentloop.tool.base import Tool
from agentloop.tool.function import FunctionTool
from agentloop.tool.session import Toolset
from agentloop.types import Task, ToolCall, ToolResult


class Weather(Tool):
    def __init__(self) -> None:
        super().__init__({}, {"type": "function", "function": {"name": "weather"}})

    async def open(self, task: Task, city: str = "Oslo", unit: str = "C") -> Any:
        return city, unit

    async def execute(self, state: Any, arguments: dict[str, Any], lang: str = "en") -> ToolResult:
        return ToolResult(f"{state} {lang}")


def add(a: int, b: int = 2) -> int:
    """Add two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


TOOLS = Toolset([Weather(), FunctionTool(add)])


def task(tools_kwargs: Any) -> Task:
    return Task("0", "a", [], extra_info={"tools_kwargs": tools_kwargs})


def test_arguments_that_a_tool_takes_are_accepted() -> None:
    TOOLS.check(task({"weather": {"create_kwargs": {"city": "Rome"}, "execute_kwargs": {"lang": "it"}}}), "row 1")
    TOOLS.check(task({"weather": {"calc_reward_kwargs": {"any": 1}}, "add": {"execute_kwargs": {"b": 5}}}), "row 1")
    TOOLS.check(task({"weather": {"create_kwargs": {"nowhere": None}}}), "row 1")
    TOOLS.check(task(None), "row 1")
    Toolset().check(task({"weather": {}}), "row 1")  # a run without tools may use the rows of one with


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"wheather": {}}, "names the tool 'wheather'; the tools are: weather, add\n  fix: did you mean 'weather'?"),
        ({"weather": {"create_kwargs": {"town": "Rome"}}}, "weather.create_kwargs: Weather.open() got an unexpected"),
        (
            {"weather": {"execute_kwargs": {"arguments": 1}}},
            "weather.execute_kwargs: Weather.execute() multiple values",
        ),
        ({"add": {"execute_kwargs": {"c": 1}}}, "add.execute_kwargs: FunctionTool.execute() got an unexpected"),
    ],
)
def test_others_are_refused_with_row_and_column(kwargs: Any, says: str) -> None:
    with pytest.raises(DataError) as caught:
        TOOLS.check(task(kwargs), "a.jsonl, row 3")
    assert says in str(caught.value) and str(caught.value).startswith(
        "a.jsonl, row 3: column 'extra_info.tools_kwargs'"
    )


async def test_a_null_does_not_override_a_default_and_the_rows_arguments_win() -> None:
    kwargs = {"weather": {"create_kwargs": {"city": None, "unit": "F"}}, "add": {"execute_kwargs": {"a": 40}}}
    session = TOOLS.session(task(kwargs))
    assert (await session.call(ToolCall("weather", {}), 5)).text == "('Oslo', 'F') en"
    assert (await session.call(ToolCall("add", {"a": 1}), 5)).text == "42"
