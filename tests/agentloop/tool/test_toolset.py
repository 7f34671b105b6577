"""Tool YAML, registry and rewards by reference: each wrong entry says which and why."""

from __future__ import annotations

import asyncio
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from agentloop import registry
from agentloop.agent.loading import list_agents, load_agent
from agentloop.config import RewardConfig
from agentloop.errors import ConfigError, RegistryError, ToolConfigError, ToolError
from agentloop.registry import AGENTS, TOOLS, load
from agentloop.reward.loading import load_reward
from agentloop.tool.arguments import argument_fault
from agentloop.tool.base import Tool
from agentloop.tool.function import FunctionTool
from agentloop.tool.loading import load_toolset
from agentloop.tool.session import Toolset
from agentloop.types import Task, ToolCall, ToolResult, Trajectory

FUNCTION = "{name: x, description: d, parameters: {type: object, properties: {}}}"
SCHEMA = f"tool_schema: {{type: function, function: {FUNCTION}}}"


def add(a: int, b: int = 2) -> int:
    """
    Add two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tools: [", "not valid YAML"),
        ("tolls: []", "has no list `tools`"),
        ("tools: []", "has no list `tools`"),
        ("tools: [{config: {}}]", "tool 1 has no class_name"),
        (f"tools: [{{class_name: nowhere.Tool, {SCHEMA}}}]", "nowhere.Tool cannot be imported"),
        (f"tools: [{{class_name: tools.calculator.Nothing, {SCHEMA}}}]", "tools.calculator.Nothing cannot be imported"),
        (f"tools: [{{class_name: Tool, {SCHEMA}}}]", "tool 1: 'Tool' is not registered in agentloop.tools"),
        (f"tools: [{{class_name: ./none.py:Tool, {SCHEMA}}}]", "tool 1: class_name: .*none.py does not exist"),
        (f"tools: [{{class_name: pathlib.Path, {SCHEMA}}}]", "is not a Tool"),
        ("tools: [{class_name: tools.calculator.Calculator}]", "no tool_schema"),
        (
            f"tools: [{{class_name: tools.calculator.Calculator, {SCHEMA}}}, "
            f"{{class_name: tools.calculator.Calculator, {SCHEMA}}}]",
            r"two tools are named 'x': tools.calculator.Calculator \(tool 1 .*\) and .* \(tool 2 of ",
        ),
        (
            f"tools: [{{class_name: tools.calculator.Calculator, {SCHEMA.replace('name: x', 'name: my add')}}}]",
            r"Calculator \(tool 1 of .*\): no model can call a tool by the name 'my add'(.|\n)*such as 'my_add'",
        ),
        (
            "tools: [{class_name: ./none.py:add}]",
            r"class_name: .*none.py does not exist\n  fix: write path.py:name, relative to the folder of the tool YAML",
        ),
        (
            f"tools: [{{class_name: tools.parsing.parse, {SCHEMA}}}]",
            r"tools.parsing.parse is a function, whose schema is made of its type hints(.|\n)*remove tool_schema",
        ),
        (
            f"tools: [{{class_name: http, {SCHEMA.replace('properties: {}', 'properties: {a: {type: list}}')}}}]",
            r"tool 1: the tool_schema of http, x: parameters, 'a' has the type 'list'",
        ),
        (
            f"tools: [{{class_name: http, config: {{url: 'http://h'}}, {SCHEMA.replace('name: x', 'name: a$b')}}}]",
            r"http \(tool 1 of .*\): no model can call a tool by the name 'a.b'",
        ),
    ],
)
def test_a_wrong_tool_yaml_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "tools.yaml"
    path.write_text(text)
    with pytest.raises(ToolConfigError, match=says):
        load_toolset(path)


def test_a_tool_may_live_in_a_file_beside_the_yaml(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from agentloop import Tool, ToolResult\n"
        "class Mine(Tool):\n"
        "    async def execute(self, state, arguments):\n"
        "        return ToolResult('done')\n"
    )
    (tmp_path / "tools.yaml").write_text(f"tools: [{{class_name: './mine.py:Mine', {SCHEMA}}}]")
    toolset = load_toolset(tmp_path / "tools.yaml")
    assert type(toolset.tools["x"]).__name__ == "Mine"


def test_a_tool_that_does_nothing_is_refused_before_a_run_begins(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from agentloop import Tool\nclass Mine(Tool):\n    async def exceute(self, state, arguments): ...\n"
    )
    (tmp_path / "tools.yaml").write_text(f"tools: [{{class_name: './mine.py:Mine', {SCHEMA}}}]")
    with pytest.raises(ToolConfigError, match=r"mine.py:Mine is abstract\n.*write its method execute\(\)"):
        load_toolset(tmp_path / "tools.yaml")


def test_a_tool_may_be_a_registered_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("adder", f"{__name__}:add", TOOLS)
    monkeypatch.setattr(registry, "registered", lambda group: {"adder": entry})
    monkeypatch.setattr(EntryPoint, "load", lambda self: add)
    (tmp_path / "tools.yaml").write_text("tools: [{class_name: adder}]")
    assert load_toolset(tmp_path / "tools.yaml").schemas[0]["function"]["name"] == "add"


async def test_a_tool_that_returns_no_result_is_a_fault_of_the_tool() -> None:
    class Careless(Tool):
        async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> Any:
            return "text"

    session = Toolset([Careless({}, {"function": {"name": "t"}})]).session(Task("0", "a", []))
    with pytest.raises(ToolError, match="t returned str, not a ToolResult"):
        await session.call(ToolCall("t", {}), 5)


async def test_a_timeout_of_the_tools_own_is_told_as_it_is() -> None:
    class Waiting(Tool):
        async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
            raise TimeoutError("the page did not load")

    session = Toolset([Waiting({}, {"function": {"name": "t"}})]).session(Task("0", "a", []))
    result = await session.call(ToolCall("t", {}), 5)
    assert result.text == "Error: TimeoutError: the page did not load"


def test_a_missing_tool_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ToolConfigError, match="does not exist"):
        load_toolset(tmp_path / "none.yaml")


async def test_a_typed_function_is_a_tool() -> None:
    toolset = Toolset([FunctionTool(add)])
    assert toolset.schemas[0]["function"]["parameters"]["properties"]["a"]["type"] == "integer"
    session = toolset.session(Task("0", "a", []))
    assert (await session.call(ToolCall("add", {"a": 3}), 5)).text == "5"
    assert (await session.call(ToolCall("add", {"a": "three"}), 5)).error


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"n": 1, "kind": "a"}, None),
        ({"n": 1.5, "kind": "a"}, "has to be of type integer"),
        ({"n": True, "kind": "a"}, "has to be of type integer"),
        ({"n": 1, "kind": "c"}, "has to be one of"),
        ({"n": 1}, "needs the argument 'kind'"),
        ({"n": 1, "kind": "a", "many": ["x"]}, None),
        ({"n": 1, "kind": "a", "many": "x"}, "has to be of type array or null"),
    ],
)
def test_arguments_are_checked_against_the_schema(arguments: dict[str, Any], fault: str | None) -> None:
    properties = {"n": {"type": "integer"}, "kind": {"enum": ["a", "b"]}, "many": {"type": ["array", "null"]}}
    parameters = {"properties": properties, "required": ["n", "kind"]}
    found = argument_fault({"function": {"name": "f", "parameters": parameters}}, arguments)
    assert (found is None) if fault is None else (found is not None and fault in found)


def test_a_schema_may_allow_more_arguments() -> None:
    schema = {"function": {"name": "f", "parameters": {"properties": {}, "additionalProperties": True}}}
    assert argument_fault(schema, {"anything": 1}) is None


def test_the_built_in_agents_are_registered() -> None:
    assert {"tool_agent", "single_turn_agent"} <= {name for name, _, _ in list_agents()}
    assert load_agent("tool_agent").__name__ == "ToolAgent"


def test_an_unknown_entry_point_lists_the_known() -> None:
    with pytest.raises(RegistryError, match=r"known: .*single_turn_agent"):
        load(AGENTS, "nobody")


async def test_a_reward_is_a_file_or_a_registered_name(tmp_path: Path) -> None:
    trajectory = Trajectory([1], [0], [None], [None], 1)
    path = tmp_path / "r.py"
    path.write_text("def score(task, text, trajectory):\n    return len(text)\n\nnumber = 3\n")
    reward = load_reward(RewardConfig(function=f"{path}:score"))
    assert reward is not None and await reward(Task("0", "a", []), "abc", trajectory) == 3
    gsm8k = load_reward(RewardConfig(function="gsm8k"))
    assert gsm8k is not None
    scored = await gsm8k(Task("0", "a", [], ground_truth="7"), "#### 7", trajectory)
    assert scored == {"score": 1.0, "correct": 1.0, "answer": "7"}
    assert load_reward(None) is None


@pytest.mark.parametrize(
    ("reference", "kind", "says"),
    [
        ("none.py:score", ConfigError, "does not exist"),
        ("r.py:nothing", ConfigError, "does not define 'nothing'"),
        ("r.py:number", ConfigError, "is not a function"),
        ("broken.py:score", ConfigError, "cannot be imported: ZeroDivisionError"),
        ("unregistered", RegistryError, "known: .*gsm8k"),
    ],
)
def test_a_wrong_reward_reference_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, kind: type[Exception], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text("number = 3\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(kind, match=says):
        load_reward(RewardConfig(function=reference))


async def test_a_tool_that_limits_its_time_itself_is_not_cut() -> None:
    class Patient(Tool):
        own_time_limit = True

        async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
            await asyncio.sleep(0.01)
            return ToolResult("late")

    session = Toolset([Patient({}, {"function": {"name": "t"}})]).session(Task("0", "a", []))
    assert (await session.call(ToolCall("t", {}), 0.001)).text == "late"


async def test_a_final_failure_is_not_repeated() -> None:
    calls = []

    class Tired(Tool):
        async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
            calls.append(1)
            raise ToolError("gone", final=True)

    session = Toolset([Tired({}, {"function": {"name": "t"}})]).session(Task("0", "a", []))
    with pytest.raises(ToolError, match="gone"):
        await session.call(ToolCall("t", {}), 5)
    assert len(calls) == 1
