"""The tools of a run, and the tools of one episode."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError, RegistryError, ToolConfigError, ToolError
from agentloop.imports import read_entries
from agentloop.registry import TOOLS, load_reference
from agentloop.runtime.isolation import describe
from agentloop.tool.base import FunctionTool, Tool
from agentloop.types import Task, ToolCall, ToolResult

TOOL_RETRIES = 2
CLOSE_TIMEOUT_S = 30.0
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


class Toolset:
    """The tools that a recipe offers, by name."""

    def __init__(self, tools: Iterable[Tool] = ()) -> None:
        self.tools: dict[str, Tool] = {}
        for tool in tools:
            if tool.name in self.tools:
                raise ToolConfigError(f"two tools are called {tool.name!r}", "give each a name of its own")
            self.tools[tool.name] = tool

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """What the chat template shows the model."""
        return [tool.schema for tool in self.tools.values()]

    def session(self, task: Task) -> ToolSession:
        """The tools of one episode."""
        return ToolSession(self.tools, task)

    def close(self) -> None:
        """End what the tools keep for the whole run: their threads and processes."""
        for tool in self.tools.values():
            tool.shut_down()


class ToolSession:
    """One episode's use of the tools: each is opened at its first call and closed by `close`."""

    def __init__(self, tools: dict[str, Tool], task: Task) -> None:
        self._tools = tools
        self._task = task
        self._states: dict[str, Any] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def call(self, call: ToolCall, timeout_s: float) -> ToolResult:
        """Run one call. A wrong call, a tool that raises and a timeout are results that the model reads.

        Raises:
            ToolError: the tool's machinery failed more often than it is retried.
        """
        tool = self._tools.get(call.name)
        if tool is None:
            known = ", ".join(self._tools) or "none"
            return _error(f"there is no tool {call.name!r}; the tools are: {known}")
        fault = argument_fault(tool.schema, call.arguments)
        if fault:
            return _error(fault)
        kwargs = self._task.tool_kwargs(call.name).get("execute_kwargs", {})
        for attempt in range(TOOL_RETRIES + 1):
            clock = asyncio.timeout(timeout_s)
            try:
                async with clock:
                    state = await self._open(tool)
                    return _checked(tool, await tool.execute(state, call.arguments, **kwargs))
            except ToolError:
                if attempt == TOOL_RETRIES:
                    raise
                await asyncio.sleep(0.1 * 2**attempt)
            except Exception as exc:  # noqa: BLE001  # whatever a tool raises, it ends this call and not the episode
                if isinstance(exc, TimeoutError) and clock.expired():
                    return _error(f"{call.name} took longer than {timeout_s:g} s and was stopped")
                return _error(describe(exc))
        raise AssertionError("unreachable")

    async def rewards(self) -> dict[str, float]:
        """The verdicts of the opened tools that have one."""
        parts = {}
        for name, state in self._states.items():
            kwargs = self._task.tool_kwargs(name).get("calc_reward_kwargs", {})
            reward = await self._tools[name].reward(state, **kwargs)
            if reward is not None:
                parts[name] = float(reward)
        return parts

    async def close(self) -> None:
        """Close every opened tool; one that fails to close, or hangs, does not keep the others open."""
        states, self._states = self._states, {}
        if states:
            await asyncio.gather(*(self._close(name, state) for name, state in states.items()), return_exceptions=True)

    async def _close(self, name: str, state: Any) -> None:
        kwargs = self._task.tool_kwargs(name).get("release_kwargs", {})
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await self._tools[name].close(state, **kwargs)

    async def _open(self, tool: Tool) -> Any:
        """The tool's state in this episode.

        Raises:
            ToolError: it could not be opened; the model cannot help that.
        """
        if tool.name in self._states:
            return self._states[tool.name]
        async with self._locks.setdefault(tool.name, asyncio.Lock()):
            if tool.name not in self._states:
                kwargs = self._task.tool_kwargs(tool.name).get("create_kwargs", {})
                try:
                    self._states[tool.name] = await tool.open(self._task, **kwargs)
                except ToolError:
                    raise
                except Exception as exc:
                    raise ToolError(
                        f"{tool.name} could not be opened for row {self._task.task_id}: {type(exc).__name__}: {exc}",
                        f"see extra_info.tools_kwargs.{tool.name}.create_kwargs of that row",
                    ) from exc
            return self._states[tool.name]


def argument_fault(schema: dict[str, Any], arguments: dict[str, Any]) -> str | None:
    """What is wrong with a call's arguments, in words for the model; None when nothing is."""
    parameters = schema["function"].get("parameters") or {}
    properties = parameters.get("properties") or {}
    name = schema["function"]["name"]
    missing = [key for key in parameters.get("required", ()) if key not in arguments]
    if missing:
        return f"{name} needs the argument {missing[0]!r}"
    for key, value in arguments.items():
        if key not in properties:
            if parameters.get("additionalProperties"):
                continue
            return f"{name} has no argument {key!r}; its arguments are: {', '.join(properties)}"
        wanted = properties[key].get("type")
        names = [wanted] if isinstance(wanted, str) else list(wanted or ())
        allowed = tuple(kind for entry in names for kind in JSON_TYPES.get(entry, ()))
        if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)):
            return f"the argument {key!r} of {name} has to be of type {' or '.join(names)}"
        if "enum" in properties[key] and value not in properties[key]["enum"]:
            return f"the argument {key!r} of {name} has to be one of {properties[key]['enum']}"
    return None


def load_toolset(path: Path) -> Toolset:
    """Load a tool YAML: `tools: [{class_name, config, tool_schema}]`.

    `class_name` is `module.path.Class`, `path.py:Class` relative to the YAML, or a name that a package registered in
    the entry-point group `agentloop.tools`; what it names is a subclass of `Tool`, or a plain function.

    Raises:
        ToolConfigError: naming file, entry and class.
    """
    entries = read_entries(path, "tools", "{class_name, config, tool_schema}", ToolConfigError)
    return Toolset(
        [_load_tool(entry, path.parent, f"{path}, tool {number}") for number, entry in enumerate(entries, 1)]
    )


def _load_tool(entry: Any, folder: Path, where: str) -> Tool:
    if not isinstance(entry, dict) or not isinstance(entry.get("class_name"), str):
        raise ToolConfigError(f"{where} has no class_name", "name a class, for instance tools.calculator.Calculator")
    class_name = entry["class_name"]
    try:
        kind = load_reference(class_name, folder, TOOLS)
    except (ConfigError, RegistryError) as exc:
        raise ToolConfigError(f"{where}: {exc.message}", exc.hint) from exc
    if inspect.isfunction(kind):
        return FunctionTool(kind, entry.get("config"), class_name, folder)
    if not (inspect.isclass(kind) and issubclass(kind, Tool)):
        raise ToolConfigError(f"{where}: {class_name} is no Tool", "subclass agentloop.Tool, or name a plain function")
    if inspect.isabstract(kind):
        raise ToolConfigError(f"{where}: {class_name} does not say what it does", "write its method execute()")
    if not inspect.iscoroutinefunction(kind.execute):
        raise ToolConfigError(
            f"{where}: {class_name}.execute() is no `async def`",
            "make it one, and run what blocks in asyncio.to_thread; a plain function with `config: {run_in: process}` "
            "runs in a process",
        )
    schema = entry.get("tool_schema")
    if not isinstance(schema, dict) or not isinstance((schema.get("function") or {}).get("name"), str):
        raise ToolConfigError(f"{where}: {class_name} has no tool_schema with a function name", "add tool_schema")
    return kind(entry.get("config") or {}, schema)


def _checked(tool: Tool, result: Any) -> ToolResult:
    if not isinstance(result, ToolResult):
        raise ToolError(
            f"{tool.name} returned {type(result).__name__}, no ToolResult", "return agentloop.ToolResult(text)"
        )
    return result


def _error(text: str) -> ToolResult:
    return ToolResult(f"Error: {text}", error=text)
