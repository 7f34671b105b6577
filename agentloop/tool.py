"""What a tool is: opened once per episode, executed any number of times, closed in every outcome."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from agentloop.types import Task, ToolResult


class Tool:
    """Base of all tools. One instance serves all episodes; what belongs to an episode is the state that `open` returns.

    Args:
        config: the `config` mapping of the tool YAML.
        schema: the `tool_schema` mapping, `{"type": "function", "function": {...}}`.
    """

    def __init__(self, config: dict[str, Any], schema: dict[str, Any]) -> None:
        self.config = config
        self.schema = schema

    @property
    def name(self) -> str:
        return str(self.schema["function"]["name"])

    async def open(self, task: Task, **create_kwargs: Any) -> Any:
        """Begin an episode; returns its state. `create_kwargs` are the row's (`extra_info.tools_kwargs`)."""
        return None

    async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        """Run one call. What it raises is told to the model, but for `ToolError`: that fails the episode."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it does: write execute()")

    async def reward(self, state: Any, **calc_reward_kwargs: Any) -> float | None:
        """The tool's own verdict on the episode, kept in `reward_parts`; None: it has none."""
        return None

    async def close(self, state: Any, **release_kwargs: Any) -> None:
        """End an episode, whatever its outcome."""


class FunctionTool(Tool):
    """A plain typed function with a docstring as a tool; blocking ones run in a thread."""

    def __init__(self, function: Callable[..., Any]) -> None:
        from transformers.utils import get_json_schema

        super().__init__({}, get_json_schema(function))
        self._function = function

    async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        if inspect.iscoroutinefunction(self._function):
            result = await self._function(**arguments, **execute_kwargs)
        else:
            result = await asyncio.to_thread(self._function, **arguments, **execute_kwargs)
        return result if isinstance(result, ToolResult) else ToolResult(str(result))
