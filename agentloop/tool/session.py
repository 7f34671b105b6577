"""The tools of a run, and the tools of one episode."""

from __future__ import annotations

import asyncio
import reprlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from agentloop.errors import RewardError, ToolConfigError, ToolError
from agentloop.faults import Fault
from agentloop.numbers import finite_number
from agentloop.runtime.isolation import describe, fault_of
from agentloop.tool.base import Tool
from agentloop.tool.row_kwargs import check_row_kwargs
from agentloop.trace.spans import span
from agentloop.types import LONGEST_TEXT, Task, ToolCall, ToolResult, bounded_text

TOOL_RETRIES = 2
CLOSE_TIMEOUT_S = 30.0

MOST_FAULTS = 8
"""Exceptions of an episode's tools that its trace keeps."""

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
                raise ToolConfigError(f"two tools are named {tool.name!r}", "give each a different name")
            self.tools[tool.name] = tool

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The schemas that the chat template shows the model."""
        return [tool.schema for tool in self.tools.values()]

    def check(self, task: Task, where: str) -> None:
        """Check the arguments that a row gives to tools; `where` names the row.

        Raises:
            DataError: a tool does not exist, or does not take them.
        """
        check_row_kwargs(self.tools, task, where)

    def session(self, task: Task) -> ToolSession:
        """Return the tools of one episode."""
        return ToolSession(self.tools, task)

    def close(self) -> None:
        """Release the tools' resources of the whole run: threads and processes."""
        for tool in self.tools.values():
            tool.shut_down()


class ToolSession:
    """One episode's use of the tools: each is opened at its first call and closed by `close`.

    Attributes:
        faults: exceptions of the tools so far that did not fail the episode, at most `MOST_FAULTS`.
    """

    def __init__(self, tools: dict[str, Tool], task: Task) -> None:
        self._tools = tools
        self._task = task
        self._states: dict[str, Any] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self.faults: list[Fault] = []

    async def call(self, call: ToolCall, timeout_s: float) -> ToolResult:
        """Run one call. A wrong call, an exception and a timeout become results for the model.

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
            clock = asyncio.timeout(None if tool.own_time_limit else timeout_s)
            try:
                async with clock:
                    state = await self._open(tool)
                    return _checked(tool, await tool.execute(state, call.arguments, **kwargs))
            except ToolError as exc:
                if attempt == TOOL_RETRIES or exc.final:
                    raise
                await asyncio.sleep(0.1 * 2**attempt)
            except Exception as exc:  # noqa: BLE001  # what a tool raises ends its call, not the episode
                if isinstance(exc, TimeoutError) and clock.expired():
                    return _error(f"{call.name} took longer than {timeout_s:g} s and was stopped")
                self._note(call.name, exc)
                return _error(describe(exc))
        raise AssertionError("unreachable")

    async def rewards(self) -> dict[str, float]:
        """Return the rewards of the opened tools that give one, by name.

        Raises:
            RewardError: one of them is not a finite number.
        """
        parts = {}
        for name, state in self._states.items():
            tool = self._tools[name]
            if type(tool).reward is Tool.reward:  # it gives none
                continue
            kwargs = self._task.tool_kwargs(name).get("calc_reward_kwargs", {})
            with span("reward", reward=name) as running:
                reward = await tool.reward(state, **kwargs)
                if reward is not None:
                    running.set(score=reward)
            if reward is not None:
                number = finite_number(reward)
                if number is None:
                    raise RewardError(
                        f"the tool {name} returned the reward {reprlib.repr(reward)}, not a finite number",
                        "return a finite number, or None",
                    )
                parts[name] = number
        return parts

    async def close(self) -> None:
        """Close all opened tools, even if one of them hangs or fails."""
        states, self._states = self._states, {}
        if states:
            closing = [self._close(name, state) for name, state in states.items()]
            for name, result in zip(states, await asyncio.gather(*closing, return_exceptions=True), strict=True):
                if isinstance(result, Exception):
                    self._note(name, result)

    def _note(self, name: str, exc: Exception) -> None:
        fault = fault_of(f"the tool {name}", exc)
        if fault is not None and len(self.faults) < MOST_FAULTS:
            self.faults.append(fault)

    async def _close(self, name: str, state: Any) -> None:
        kwargs = self._task.tool_kwargs(name).get("release_kwargs", {})
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await self._tools[name].close(state, **kwargs)

    async def _open(self, tool: Tool) -> Any:
        """Return the tool's state in this episode.

        Raises:
            ToolError: it could not be opened, which is not the model's fault.
        """
        if tool.name in self._states:
            return self._states[tool.name]

        # Parallel calls of one turn open the tool once.
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
    """Check a call's arguments; return the fault in words for the model, or None."""
    parameters = schema["function"].get("parameters") or {}
    properties = parameters.get("properties") or {}
    name = schema["function"]["name"]
    missing = [key for key in parameters.get("required") or () if key not in arguments]
    if missing:
        return f"{name} needs the argument {missing[0]!r}"

    for key, value in arguments.items():
        if key not in properties:
            if parameters.get("additionalProperties"):
                continue
            return f"{name} has no argument {key!r}; its arguments are: {', '.join(properties)}"

        # Tools made in Python may have a schema that `read_schema` has not seen.
        schema_of_key = properties[key] if isinstance(properties[key], dict) else {}
        wanted = schema_of_key.get("type")
        names = [wanted] if isinstance(wanted, str) else list(wanted or ())
        allowed = tuple(kind for entry in names for kind in JSON_TYPES.get(entry, ()))
        if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)):
            return f"the argument {key!r} of {name} has to be of type {' or '.join(names)}"
        choices = schema_of_key.get("enum")
        if choices is not None and value not in choices:
            return f"the argument {key!r} of {name} has to be one of {choices}"
    return None


def _checked(tool: Tool, result: Any) -> ToolResult:
    if not isinstance(result, ToolResult):
        raise ToolError(
            f"{tool.name} returned {type(result).__name__}, not a ToolResult", "return agentloop.ToolResult(text)"
        )
    if not isinstance(result.text, str):
        raise ToolError(
            f"{tool.name} returned a ToolResult whose text is {type(result.text).__name__}", "give it a string"
        )
    return result if len(result.text) <= LONGEST_TEXT else replace(result, text=bounded_text(result.text))


def _error(text: str) -> ToolResult:
    text = bounded_text(text)
    return ToolResult(f"Error: {text}", error=text)
