"""The tools of a run, and the tools of one episode."""

from __future__ import annotations

import asyncio
import re
import reprlib
from collections.abc import Hashable, Iterable
from dataclasses import replace
from typing import Any

from agentloop.client.time_limit import TimeLimit
from agentloop.errors import ImageError, RewardError, ToolConfigError, ToolError, ToolUnavailable
from agentloop.faults import Fault, contained
from agentloop.images import check_form
from agentloop.numbers import finite_number
from agentloop.runtime.isolation import describe, fault_of
from agentloop.text import clean
from agentloop.tool.arguments import read_arguments
from agentloop.tool.base import TOOL_NAME, Tool
from agentloop.tool.row_kwargs import check_row_kwargs
from agentloop.tool.secrets import hide
from agentloop.trace.spans import span
from agentloop.types import LONGEST_TEXT, Task, ToolCall, ToolResult, bounded_text

TOOL_RETRIES = 2
CLOSE_TIMEOUT_S = 30.0

MOST_FAULTS = 8
"""Exceptions of an episode's tools that its trace keeps."""

CONVERTED = "converted_arguments"
"""Metric of a result: values that the model wrote as text, and the tool got as the schema says."""


class Toolset:
    """The tools that a recipe offers, by name."""

    def __init__(self, tools: Iterable[Tool] = ()) -> None:
        self.tools: dict[str, Tool] = {}
        for tool in tools:
            if not TOOL_NAME.fullmatch(tool.name):
                word = re.sub(r"[^\w.:/-]+", "_", tool.name.strip())[:64]
                raise ToolConfigError(
                    f"{_origin(tool)}: no model can call a tool by the name {clean(repr(tool.name), 200)}",
                    f"write a word such as {word or 'find'!r}: letters, digits, _, -, ., : and /, at most 128 of them",
                )
            other = self.tools.get(tool.name)
            if other is not None:
                raise ToolConfigError(
                    f"two tools are named {tool.name!r}: {_origin(other)} and {_origin(tool)}",
                    "give each a different name; those of a server take a `prefix`",
                )
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

    def session(self, task: Task, given: str | None = None) -> ToolSession:
        """Return the tools of one episode. Arguments as of `ToolSession`."""
        return ToolSession(self.tools, task, given)

    def close(self) -> None:
        """Release the tools' resources of the whole run: threads and processes."""
        for tool in self.tools.values():
            tool.shut_down()


class ToolSession:
    """One episode's use of the tools: each is opened at its first call and closed by `close`.

    Args:
        given: for a task that is not a row of a file: how what a row holds is given to it, for
            messages.

    Attributes:
        faults: exceptions of the tools so far that did not fail the episode, at most `MOST_FAULTS`.
    """

    def __init__(self, tools: dict[str, Tool], task: Task, given: str | None = None) -> None:
        self._tools = tools
        self._task = task
        self._given = given
        self._states: dict[Hashable, tuple[Tool, Any]] = {}  # with the tool that opened it
        self._locks: dict[Hashable, asyncio.Lock] = {}
        self.faults: list[Fault] = []

    async def call(self, call: ToolCall, timeout_s: float) -> ToolResult:
        """Run one call. A wrong call, an exception and a timeout become results for the model.

        Raises:
            ToolError: the tool's machinery failed more often than it is retried.
        """
        tool = self._tools.get(call.name)
        if tool is None:
            known = ", ".join(self._tools) or "none"
            return _error(f"the tool {call.name!r} is not known; the tools are: {known}")
        read = read_arguments(tool.schema, call.arguments)
        if read.fault is not None:
            return _error(read.fault)

        kwargs = self._task.tool_kwargs(call.name).get("execute_kwargs", {})
        for attempt in range(TOOL_RETRIES + 1):
            clock = TimeLimit(None if tool.own_time_limit else timeout_s)
            try:
                async with clock:
                    state = await self._open(tool)
                    with contained():
                        result = _checked(tool, await tool.execute(state, read.values, **kwargs))
                    return _counted(_hidden(tool, result), read.converted)
            except ToolError as exc:
                if attempt == TOOL_RETRIES or exc.final:
                    if not tool.secrets:
                        raise
                    # Neither the message nor a cause may show what only the tool may know.
                    message, hint = hide(exc.message, tool.secrets), exc.hint and hide(exc.hint, tool.secrets)
                    kind = ToolUnavailable if isinstance(exc, ToolUnavailable) else ToolError
                    raise kind(message, hint, exc.final) from None
                await asyncio.sleep(0.1 * 2**attempt)
            except Exception as exc:  # noqa: BLE001  # what a tool raises ends its call, not the episode
                if isinstance(exc, TimeoutError) and clock.expired():
                    return _error(f"{call.name} took longer than {timeout_s:g} s and was stopped")
                if not tool.secrets:
                    self._note(call.name, exc)
                return _error(hide(describe(exc), tool.secrets))
        raise AssertionError("unreachable")

    async def rewards(self) -> dict[str, float]:
        """Return the rewards of the opened tools that give one, by name.

        Raises:
            RewardError: one of them is not a finite number.
        """
        parts = {}
        for tool, state in self._states.values():
            name = tool.name
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
            closing = [self._close(tool, state) for tool, state in states.values()]
            results = await asyncio.gather(*closing, return_exceptions=True)
            for (tool, _), result in zip(states.values(), results, strict=True):
                if isinstance(result, Exception):
                    self._note(tool.name, result)

    def _note(self, name: str, exc: Exception) -> None:
        fault = fault_of(f"the tool {name}", exc)
        if fault is not None and len(self.faults) < MOST_FAULTS:
            self.faults.append(fault)

    async def _close(self, tool: Tool, state: Any) -> None:
        kwargs = self._task.tool_kwargs(tool.name).get("release_kwargs", {})
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await tool.close(state, **kwargs)

    async def _open(self, tool: Tool) -> Any:
        """Return the tool's state in this episode.

        Raises:
            ToolError: it could not be opened, which is not the model's fault.
        """
        key = tool.state_key
        if key in self._states:
            return self._states[key][1]

        # Parallel calls of one turn open the tool once.
        async with self._locks.setdefault(key, asyncio.Lock()):
            if key not in self._states:
                kwargs = self._task.tool_kwargs(tool.name).get("create_kwargs", {})
                try:
                    with contained():
                        self._states[key] = tool, await tool.open(self._task, **kwargs)
                except ToolError as exc:
                    if self._given is not None:
                        exc.add_note(f"  {self._given}")
                    raise
                except Exception as exc:
                    raise self._not_opened(tool, exc, with_kwargs=bool(kwargs)) from exc
            return self._states[key][1]

    def _not_opened(self, tool: Tool, exc: Exception, *, with_kwargs: bool) -> ToolError:
        """Return the error for an exception of `open`. Its fix is the line of user code that raised
        it, and what the task gives to the tool if it does."""
        fault = fault_of("", exc)
        places = [fault.where] if fault is not None else []
        if with_kwargs and self._given is None:
            places.append(f"extra_info.tools_kwargs.{tool.name}.create_kwargs of that row")
        row = f" for row {self._task.task_id}" if self._given is None else ""
        hint = "; ".join(filter(None, [f"see {' and '.join(places)}" if places else None, self._given]))
        return ToolError(f"{tool.name} could not be opened{row}: {describe(exc)}", hint or None)


def _origin(tool: Tool) -> str:
    return tool.origin or f"{type(tool).__module__}.{type(tool).__qualname__}"


def _checked(tool: Tool, result: Any) -> ToolResult:
    if not isinstance(result, ToolResult):
        raise ToolError(
            f"{tool.name} returned {type(result).__name__}, not a ToolResult", "return agentloop.ToolResult(text)"
        )
    if not isinstance(result.text, str):
        raise ToolError(
            f"{tool.name} returned a ToolResult whose text is {type(result.text).__name__}", "give it a string"
        )
    if result.images is not None:
        _check_images(tool, result.images)
    return result if len(result.text) <= LONGEST_TEXT else replace(result, text=bounded_text(result.text))


def _check_images(tool: Tool, images: Any) -> None:
    """Check that the images of a result have the form of images; they are not decoded.

    Raises:
        ToolError: one of them is something else, or they are not in a list.
    """
    if not isinstance(images, list | tuple):
        raise ToolError(
            f"{tool.name} returned a ToolResult whose images are of type {type(images).__name__}, not a list",
            "write images=[image]",
        )
    for number, image in enumerate(images, 1):
        try:
            check_form(image)
        except ImageError as exc:
            raise bad_image(tool.name, number, exc) from exc


def bad_image(tool: str, number: int, error: ImageError) -> ToolError:
    """Return the error of a tool whose result has an image that cannot be used."""
    fault = f"{tool} returned a ToolResult whose image {number} cannot be used: {error.message}"
    return ToolError(fault, error.hint, final=True)


def _hidden(tool: Tool, result: ToolResult) -> ToolResult:
    if not tool.secrets:
        return result
    error = None if result.error is None else hide(result.error, tool.secrets)
    return replace(result, text=hide(result.text, tool.secrets), error=error)


def _counted(result: ToolResult, converted: int) -> ToolResult:
    return replace(result, metrics={**result.metrics, CONVERTED: float(converted)}) if converted else result


def _error(text: str) -> ToolResult:
    text = bounded_text(text)
    return ToolResult(f"Error: {text}", error=text)
