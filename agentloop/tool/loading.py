"""Load the tool YAML that a recipe names."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError, RegistryError, ToolConfigError, UserError
from agentloop.faults import place_of, user_frames
from agentloop.imports import read_entries
from agentloop.registry import TOOLS, load_reference
from agentloop.tool.base import Tool
from agentloop.tool.function import FunctionTool
from agentloop.tool.schema import read_schema
from agentloop.tool.session import Toolset

KEYS = ("class_name", "config", "tool_schema")


def load_toolset(path: Path) -> Toolset:
    """Load a tool YAML: `tools: [{class_name, config, tool_schema}]`.

    `class_name` is `module.path.Class`, `path.py:Class` relative to the YAML, or a name that a
    package registered in the entry-point group `agentloop.tools`. It refers to a subclass of
    `Tool`, or to a plain function.

    Raises:
        ToolConfigError: naming file, entry and class.
    """
    entries = read_entries(path, "tools", "{class_name, config, tool_schema}", ToolConfigError, KEYS)
    return Toolset(
        [_load_tool(entry, path.parent, f"{path}, tool {number}") for number, entry in enumerate(entries, 1)]
    )


def _load_tool(entry: dict[str, Any], folder: Path, where: str) -> Tool:
    if not isinstance(entry.get("class_name"), str):
        raise ToolConfigError(f"{where} has no class_name", "name a class, for instance tools.calculator.Calculator")
    class_name = entry["class_name"]
    try:
        kind = load_reference(class_name, folder, TOOLS)
    except (ConfigError, RegistryError) as exc:
        raise ToolConfigError(f"{where}: {exc.message}", exc.hint) from exc

    config = entry.get("config") or {}
    if not isinstance(config, dict):
        raise ToolConfigError(f"{where}: config is not a mapping", "write config: {key: value}")
    if inspect.isfunction(kind):
        try:
            return FunctionTool(kind, config, class_name, folder)
        except ToolConfigError as exc:
            raise ToolConfigError(f"{where}: {exc.message}", exc.hint) from exc
    if not (inspect.isclass(kind) and issubclass(kind, Tool)):
        raise ToolConfigError(
            f"{where}: {class_name} is not a Tool", "subclass agentloop.Tool, or name a plain function"
        )
    if inspect.isabstract(kind):
        raise ToolConfigError(f"{where}: {class_name} is abstract", "write its method execute()")
    if not inspect.iscoroutinefunction(kind.execute):
        raise ToolConfigError(
            f"{where}: {class_name}.execute() is not an `async def`",
            "make it one, and run what blocks in asyncio.to_thread; a plain function with `config: {run_in: process}` "
            "runs in a process",
        )

    schema = entry.get("tool_schema") or copy.deepcopy(kind.default_schema)
    if schema is None:
        raise ToolConfigError(f"{where}: {class_name} has no tool_schema with a function name", "add tool_schema")
    schema = read_schema(schema, f"{where}: the tool_schema of {class_name}")
    try:
        return kind(config, schema)
    except UserError:
        raise
    except Exception as exc:
        place = place_of(user_frames(exc))
        raise ToolConfigError(
            f"{where}: {class_name} could not be created: {type(exc).__name__}: {exc}",
            f"see its `config`{f', and {place}' if place else ''}",
        ) from exc
