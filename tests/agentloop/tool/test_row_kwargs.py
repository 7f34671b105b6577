"""Arguments that rows give to tools: the tool exists and takes them."""

from __future__ import annotations

from typing import Any

import pytest

from agentloop.errors import DataError
from agentloop.tool.base import Tool
from agentloop.tool.function import FunctionTool
from agentloop.tool.session import Toolset
from agentloop.types import Task, ToolCall, ToolResult
from tools.calculator import Calculator
from tools.code import CodeInterpreter
from tools.http import HttpTool
from tools.image import ImageZoomIn
from tools.search import SearchTool


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


def made(kind: type[Tool], config: dict[str, Any], name: str, *arguments: str) -> Tool:
    parameters = {"type": "object", "properties": {each: {"type": "string"} for each in arguments}}
    return kind(config, {"type": "function", "function": {"name": name, "parameters": parameters}})


BUILT_IN = Toolset(
    [
        made(SearchTool, {"retrieval_service_url": "http://h/retrieve"}, "search", "query"),
        made(CodeInterpreter, {"sandbox_url": "http://h"}, "code", "code"),
        made(HttpTool, {"url": "http://h", "from_row": ["user"]}, "http", "city"),
        made(Calculator, {}, "calculator", "expression"),
        made(ImageZoomIn, {}, "zoom", "box"),
    ]
)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"search": {"execute_kwargs": {"top_k": 2}}}, "'top_k'; it takes topk\n  fix: did you mean 'topk'?"),
        ({"search": {"create_kwargs": {"topk": 2}}}, "SearchTool.open() got an unexpected keyword argument 'topk'"),
        ({"code": {"create_kwargs": {"fils": {}}}}, "fix: did you mean 'files'?"),
        ({"code": {"release_kwargs": {"x": 1}}}, "CodeInterpreter.close() got an unexpected keyword argument 'x'; it"),
        ({"http": {"execute_kwargs": {"cout": 9}}}, "'cout'; it takes user, city"),
        ({"calculator": {"execute_kwargs": {"x": 9}}}, "Calculator.execute() got an unexpected keyword argument 'x'"),
        ({"zoom": {"create_kwargs": {"min_side": 9}}}, "ImageZoomIn.open() got an unexpected keyword argument 'min"),
    ],
)
def test_arguments_that_a_built_in_tool_does_not_take_are_refused(kwargs: Any, says: str) -> None:
    with pytest.raises(DataError) as caught:
        BUILT_IN.check(task(kwargs), "row 1")
    assert says in str(caught.value)


def test_arguments_of_built_in_tools_and_columns_that_rows_of_other_frameworks_repeat_are_accepted() -> None:
    copied = {"create_kwargs": {"ground_truth": "x", "question": "q", "data_source": "d"}}
    BUILT_IN.check(task(dict.fromkeys(BUILT_IN.tools, copied)), "row 1")
    BUILT_IN.check(task({"search": {"execute_kwargs": {"topk": 2}}, "code": {"create_kwargs": {"files": {}}}}), "row 1")
    BUILT_IN.check(task({"http": {"execute_kwargs": {"user": 2, "city": "Rome"}}}), "row 1")
    BUILT_IN.check(task({"zoom": {"create_kwargs": {"image": "a.png"}}}), "row 1")


def test_a_subclass_of_a_built_in_tool_takes_what_its_own_methods_take() -> None:
    class Mine(Calculator):
        async def open(self, task: Task, **create_kwargs: Any) -> Any:
            return create_kwargs

    tools = Toolset([made(Mine, {}, "mine", "expression")])
    tools.check(task({"mine": {"create_kwargs": {"limit": 3}}}), "row 1")
    with pytest.raises(DataError, match=r"Mine.execute\(\) got an unexpected"):
        tools.check(task({"mine": {"execute_kwargs": {"limit": 3}}}), "row 1")


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
