"""Load the tool YAML that a recipe names."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from agentloop.errors import ConfigError, RegistryError, ToolConfigError, UserError
from agentloop.faults import place_of, user_frames
from agentloop.imports import read_entries
from agentloop.registry import TOOLS, load_reference
from agentloop.tool.base import Tool, ToolSource
from agentloop.tool.function import FunctionTool
from agentloop.tool.schema import check_words, read_schema
from agentloop.tool.secrets import hide, resolved
from agentloop.tool.session import Toolset

Created = TypeVar("Created")

KEYS = ("class_name", "config", "tool_schema", "mcp")
"""Keys of an entry. `mcp` is how other frameworks name MCP servers; here it is part of `config`."""


def load_toolset(path: Path) -> Toolset:
    """Load a tool YAML: `tools: [{class_name, config, tool_schema}]`.

    `class_name` is `module.path.Class`, `path.py:Class` relative to the YAML, or a name that a
    package registered in the entry-point group `agentloop.tools`. It refers to a subclass of
    `Tool`, to a subclass of `ToolSource` (several tools, as of an MCP server), or to a plain
    function. In `config`, `${oc.env:NAME}` stands for an environment variable.

    Raises:
        ToolConfigError: naming file, entry and class.
    """
    entries = read_entries(path, "tools", "{class_name, config, tool_schema}", ToolConfigError, KEYS)
    tools: list[Tool] = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}, tool {number}"
        written = entry.get("config") or {}
        if not isinstance(written, dict):
            raise ToolConfigError(f"{where}: config is not a mapping", "write config: {key: value}")
        if entry.get("mcp") is not None:
            written = {**written, "mcp": entry["mcp"]}
        config, secrets = resolved(written, where)
        try:
            found = _load_tools(entry, config, path.parent, where)
        except UserError as exc:
            hint = hide(exc.hint, secrets) if exc.hint is not None else None
            raise type(exc)(hide(exc.message, secrets), hint) from (None if secrets else exc)
        for tool in found:
            tool.origin = f"{entry['class_name']} (tool {number} of {path})"
            tool.secrets = tuple(sorted({*tool.secrets, *secrets}, key=len, reverse=True))
        tools += found
    return Toolset(tools)


def _load_tools(entry: dict[str, Any], config: dict[str, Any], folder: Path, where: str) -> list[Tool]:
    if not isinstance(entry.get("class_name"), str):
        raise ToolConfigError(f"{where} has no class_name", "name a class, for instance tools.calculator.Calculator")
    class_name = entry["class_name"]
    try:
        kind = load_reference(class_name, folder, TOOLS, base="the folder of the tool YAML")
    except (ConfigError, RegistryError) as exc:
        raise ToolConfigError(f"{where}: {exc.message}", exc.hint) from exc

    if inspect.isfunction(kind):
        if entry.get("tool_schema"):
            raise ToolConfigError(
                f"{where}: {class_name} is a function, whose schema is made of its type hints and its docstring",
                "remove tool_schema; for another schema, subclass agentloop.Tool",
            )
        try:
            return [FunctionTool(kind, config, class_name, folder)]
        except ToolConfigError as exc:
            raise ToolConfigError(f"{where}: {exc.message}", exc.hint) from exc
    if inspect.isclass(kind) and issubclass(kind, ToolSource):
        if entry.get("tool_schema"):
            raise ToolConfigError(f"{where}: {class_name} brings its tools' schemas", "remove tool_schema")
        return list(_created(lambda: kind(config, folder, where).tools(), class_name, where))
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
    # YAMLs of other frameworks load as they are; the published one of a search tool has `item`.
    check_words(schema, f"{where}: the tool_schema of {class_name}", keys=not class_name.startswith("verl."))
    return [_created(lambda: kind(config, schema), class_name, where)]


def _created(create: Callable[[], Created], class_name: str, where: str) -> Created:
    try:
        return create()
    except UserError:
        raise
    except Exception as exc:
        place = place_of(user_frames(exc))
        raise ToolConfigError(
            f"{where}: {class_name} could not be created: {type(exc).__name__}: {exc}",
            f"see its `config`{f', and {place}' if place else ''}",
        ) from exc
