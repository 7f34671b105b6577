"""`Tool`: opened once per episode, executed any number of times, closed in every outcome."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from agentloop.types import Task, ToolResult


class Tool(ABC):
    """Base of all tools. One instance serves all episodes; `open` returns an episode's state.

    Args:
        config: the `config` mapping of the tool YAML.
        schema: the `tool_schema` mapping, `{"type": "function", "function": {...}}`.

    Attributes:
        default_schema: the schema of an entry of the tool YAML without one; None: it is required.
        own_time_limit: `execute` limits its time itself, and `tool_timeout_s` does not apply. For
            calls that wait for their turn or for a server to return, which is not the model's
            fault.
    """

    default_schema: ClassVar[dict[str, Any] | None] = None
    own_time_limit: ClassVar[bool] = False

    def __init__(self, config: dict[str, Any], schema: dict[str, Any]) -> None:
        self.config = config
        self.schema = schema

    @property
    def name(self) -> str:
        return str(self.schema["function"]["name"])

    async def open(self, task: Task, **create_kwargs: Any) -> Any:
        """Begin an episode and return its state. `create_kwargs` come from the row
        (`extra_info.tools_kwargs`)."""
        return None

    @abstractmethod
    async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        """Run one call. The model is shown its exceptions; `ToolError` fails the episode."""

    async def reward(self, state: Any, **calc_reward_kwargs: Any) -> float | None:
        """Return the tool's own reward for the episode, kept in `reward_parts`, or None."""
        return None

    async def close(self, state: Any, **release_kwargs: Any) -> None:  # noqa: B027  # optional
        """End an episode, whatever its outcome."""

    def shut_down(self) -> None:  # noqa: B027  # optional
        """Release the resources of the whole run; called once, after the last episode."""
