"""`Tool`: opened once per episode, executed any number of times, closed in every outcome."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from agentloop.types import Task, ToolResult

TOOL_NAME = re.compile(r"[\w.:/-]{1,128}")
"""Names that every call format can write and read: one word."""

COPIED_COLUMNS = ("ground_truth", "question", "data_source")
"""Columns that data sets of other frameworks repeat in the `create_kwargs` of any tool. A tool that
does not need them takes them without effect."""

NOTHING_FROM_ROW: Mapping[str, Collection[str]] = {"open": COPIED_COLUMNS}
"""`Tool.takes_from_row` of a tool that needs no argument beside those of its signatures."""


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
        origin: the entry of the tool YAML that it comes from; None: it was made in Python.
        secrets: values from its entry of the YAML that no result and no error may show.
        takes_from_row: by method, names of the arguments that a method with `**kwargs` takes from a
            row (`extra_info.tools_kwargs`), beside those of its signature; a method that is not
            there takes none. None: whatever the signatures allow.
        service: URL of the server behind it, without credentials; None: it needs none. `agentloop
            check` tries to connect to it.
    """

    default_schema: ClassVar[dict[str, Any] | None] = None
    own_time_limit: ClassVar[bool] = False
    origin: str | None = None
    secrets: tuple[str, ...] = ()
    takes_from_row: Mapping[str, Collection[str]] | None = None
    service: str | None = None

    def __init__(self, config: dict[str, Any], schema: dict[str, Any]) -> None:
        self.config = config
        self.schema = schema

    @property
    def name(self) -> str:
        return str(self.schema["function"]["name"])

    @property
    def state_key(self) -> Hashable:
        """Tools of equal keys share an episode's state: the first that is called opens and closes
        it. For the tools of one server; by default, each has its own."""
        return self.name

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


class ToolSource(ABC):
    """What one entry of the tool YAML brings when it is several tools, such as those of a server.

    Args:
        config: the `config` mapping of the entry.
        folder: that of the tool YAML, for relative paths.
        where: the entry, for messages.
    """

    def __init__(self, config: dict[str, Any], folder: Path, where: str) -> None:
        self.config = config
        self.folder = folder
        self.where = where

    @abstractmethod
    def tools(self) -> Sequence[Tool]:
        """Return the tools.

        Raises:
            ToolConfigError: the config is wrong, or the tools cannot be found out.
        """
