"""What a tool is: opened once per episode, executed any number of times, closed in every outcome."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentloop.errors import ToolConfigError
from agentloop.registry import TOOLS
from agentloop.runtime.isolation import Caller, close, isolate
from agentloop.runtime.processes import ProcessWorkers
from agentloop.types import Task, ToolResult

ISOLATION_KEYS = ("run_in", "workers", "memory_mb")


class Tool(ABC):
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

    @abstractmethod
    async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        """Run one call. What it raises is told to the model, but for `ToolError`: that fails the episode."""

    async def reward(self, state: Any, **calc_reward_kwargs: Any) -> float | None:
        """The tool's own verdict on the episode, kept in `reward_parts`; None: it has none."""
        return None

    async def close(self, state: Any, **release_kwargs: Any) -> None:  # noqa: B027  # need not be written
        """End an episode, whatever its outcome."""

    def shut_down(self) -> None:  # noqa: B027  # need not be written
        """End what the tool keeps for the whole run; called once, when no episode uses it any more."""


class FunctionTool(Tool):
    """A plain typed function with a docstring as a tool.

    `config` says where it runs. `run_in`: `thread` (what a plain function does by itself), `process` (killed when a
    call takes too long, and nothing that it does can harm the run) or `inline` (on the event loop: only for what
    returns at once). `workers`: calls at once. `memory_mb`: address space of a process.

    Args:
        function: plain or async; arguments and result are JSON where it runs in a process.
        config: of the tool YAML.
        reference: what names the function, for a process; relative to `folder`.

    Raises:
        ToolConfigError: the config is wrong.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        config: dict[str, Any] | None = None,
        reference: str | None = None,
        folder: Path = Path(),
    ) -> None:
        from transformers.utils import get_json_schema

        super().__init__(dict(config or {}), get_json_schema(function))
        unknown = [key for key in self.config if key not in (*ISOLATION_KEYS, "type")]
        if unknown:
            raise ToolConfigError(f"{self.name}: config has the unknown key {unknown[0]!r}", _known())
        run_in = self.config.get("run_in", "thread")
        workers, memory = self.config.get("workers"), self.config.get("memory_mb")
        if run_in not in ("thread", "process", "inline"):
            raise ToolConfigError(f"{self.name}: config.run_in is {run_in!r}", "one of: thread, process, inline")
        for key, value in (("workers", workers), ("memory_mb", memory)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ToolConfigError(f"{self.name}: config.{key} is {value!r}", "give a positive integer")
        if run_in == "inline" and inspect.iscoroutinefunction(function):
            run_in = "thread"  # an async function is on the event loop already
        self._in_process = run_in == "process"

        def process(count: int) -> Caller:
            if reference is None:
                raise ToolConfigError(f"{self.name} has no name by which a process could load it", "name it in a YAML")
            return ProcessWorkers(
                reference, folder, TOOLS, form="tool", workers=count, memory_mb=memory, name=self.name
            )

        self._call = isolate(function, run_in, workers=workers, name=self.name, process=process)

    async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        if self._in_process:
            return ToolResult(**await self._call({"arguments": {**arguments, **execute_kwargs}}))
        result = await self._call(**arguments, **execute_kwargs)
        return result if isinstance(result, ToolResult) else ToolResult(str(result))

    def shut_down(self) -> None:
        close(self._call)


def _known() -> str:
    return f"known keys: {', '.join(ISOLATION_KEYS)}"
