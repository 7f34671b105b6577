"""`McpTools`, an entry of the tool YAML that names a server, and `McpTool`, one tool of it."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from agentloop.errors import ToolConfigError, ToolError
from agentloop.text import did_you_mean
from agentloop.tool.base import COPIED_COLUMNS, TOOL_NAME, Tool, ToolSource
from agentloop.tool.schema import read_schema
from agentloop.tool.secrets import hide
from agentloop.types import Task, ToolResult
from tools.mcp.settings import ServerSettings, read_settings

WRONG_CALL = (-32602, -32601)
"""Codes of JSON-RPC that blame the call: wrong arguments, an unknown tool."""


class McpTools(ToolSource):
    """The tools of an MCP server. One of `command`, `url` and `servers_file` says which.

    Keys of `config`:
        command, args, env, cwd: a program (stdio). It gets `env` and a few variables of the run
            (PATH, HOME), none of its keys.
        url, headers, transport: an address; `transport` is `http` (streamable, the default) or
            `sse`.
        servers_file: a file {"mcpServers": {...}}; all of its servers.
        tools: names of the tools to offer; null: all.
        prefix: beginning of their names for the model, against equal names.
        session: `episode` (each has its own) or `shared` (one for all of a process).
        stateful: the server remembers the episode, which fails if its session is lost. Default:
            true for a program with a session for each episode.
        images: show the images of results to the model (true); else a note stands for each.
        timeout: seconds of a call (30), after which the model is told; start_timeout: of a start.
        outage_s: seconds to wait for a URL that cannot be reached (120).
        max_sessions: episodes with a session at a time (32 for programs, 256 for URLs); others
            wait.
        num_workers, rate_limit: calls in flight (128); calls a second (null: no limit).
    """

    def __init__(self, config: dict[str, Any], folder: Path, where: str) -> None:
        super().__init__(config, folder, where)
        try:
            import mcp  # noqa: F401
        except ImportError as exc:
            raise ToolConfigError(f"{where} needs the library mcp", "pip install 'agentloop-rl[mcp]'") from exc
        self._servers = read_settings(config, folder, where)

    def tools(self) -> Sequence[Tool]:
        found: list[Tool] = []
        missing = dict.fromkeys(self._servers[0].tools or ()) if self._servers else {}
        known: list[str] = []
        for settings in self._servers:
            for tool in self._tools_of(settings):
                known.append(tool.remote_name)
                if settings.tools is None or tool.remote_name in settings.tools:
                    missing.pop(tool.remote_name, None)
                    found.append(tool)
        if missing:
            name = next(iter(missing))
            offered = f"it has: {', '.join(known)}" if known else "it has no tools"
            near = did_you_mean(name, known, "")
            raise ToolConfigError(
                f"{self.where}: the server has no tool {name!r}", f"{near} {offered}" if near else offered
            )
        if not found:
            raise ToolConfigError(f"{self.where}: the server has no tools", "name another server")
        return found

    def _tools_of(self, settings: ServerSettings) -> list[McpTool]:
        from tools.mcp.server import McpServer

        server = McpServer(settings)
        try:
            listed = _in_thread(server.list_tools())
        except (ToolError, ToolConfigError) as exc:
            hint = hide(exc.hint, settings.secrets) if exc.hint else None
            raise ToolConfigError(f"{self.where}: {hide(exc.message, settings.secrets)}", hint) from None
        found = []
        for tool in listed:
            if not TOOL_NAME.fullmatch(tool.name):
                if settings.tools is not None and tool.name not in settings.tools:
                    continue
                raise ToolConfigError(
                    f"{self.where}: the server's tool {tool.name[:80]!r} has a name that a model cannot call",
                    "list the tools to offer in `tools`",
                )
            if settings.tools is not None and tool.name not in settings.tools:
                found.append(McpTool(server, tool.name, {"function": {"name": tool.name}}))  # known, not offered
                continue
            function = {
                "name": settings.prefix + tool.name,
                "description": tool.description or tool.title or tool.name,
                "parameters": tool.input_schema,
            }
            schema = read_schema({"type": "function", "function": function}, f"{self.where}: the server's schema")
            found.append(McpTool(server, tool.name, schema))
        return found


class McpTool(Tool):
    """One tool of a server."""

    own_time_limit = True  # waiting for a session is not the model's fault

    def __init__(self, server: Any, remote_name: str, schema: dict[str, Any]) -> None:
        super().__init__({}, schema)
        self._server = server
        self.remote_name = remote_name
        self.secrets = server.settings.secrets
        parameters = schema["function"].get("parameters") or {}
        if not parameters.get("additionalProperties") and "$ref" not in parameters:
            self.takes_from_row = {"open": COPIED_COLUMNS, "execute": tuple(parameters.get("properties") or ())}

    @property
    def state_key(self) -> Hashable:
        return id(self._server)  # the tools of a server share the episode's session

    async def open(self, task: Task, **create_kwargs: Any) -> Any:
        """Return the session of this episode. The rows' arguments are not needed."""
        return await self._server.session()

    async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        """Call the server; arguments of the row win over the model's.

        Raises:
            ToolError: the server cannot be used.
        """
        from mcp import MCPError

        from tools.http.template import encodable
        from tools.mcp.content import read_answer
        from tools.mcp.server import CallStopped

        try:
            answer = await state.call(self.remote_name, encodable({**arguments, **execute_kwargs}))
        except CallStopped as exc:
            text = f"{self.name}: {exc}"
            return ToolResult(f"Error: {text}", error=text)
        except MCPError as exc:
            if exc.code in WRONG_CALL:
                return ToolResult(f"Error: {exc.message}", error=exc.message)
            raise ToolError(
                f"{self.name}: the MCP server {self._server.settings.name} answered with the error {exc.code}: "
                f"{exc.message[:500]}",
                "see its log",
            ) from None
        except (RuntimeError, ValueError) as exc:  # an answer that breaks the tool's own output schema
            raise ToolError(
                f"{self.name}: the MCP server {self._server.settings.name} gave a wrong answer: {str(exc)[:500]}",
                "see its log",
            ) from None
        return await read_answer(answer, images=self._server.settings.images)

    async def close(self, state: Any, **release_kwargs: Any) -> None:
        await state.close()

    def shut_down(self) -> None:
        self._server.shut_down()


def _in_thread(coroutine: Any) -> Any:
    """Run a coroutine in an event loop of its own: tools are also loaded from within one."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((asyncio.run(coroutine), None))
        except BaseException as exc:  # noqa: BLE001  # raised again below
            outcome.append((None, exc))

    thread = threading.Thread(target=contextvars.Context().run, args=(run,), name="mcp list")
    thread.start()
    thread.join()
    value, error = outcome[0]
    if error is not None:
        raise error
    return value
