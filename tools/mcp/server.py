"""`McpServer`: the sessions with one server, of each episode or shared by all."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Hashable
from typing import Any

from mcp import MCPError
from mcp_types import CallToolResult, Tool

from agentloop.client.time_limit import not_counted
from agentloop.errors import ToolError, ToolUnavailable
from agentloop.trace.spans import current_episode
from tools.http import RateLimit
from tools.mcp.connection import Connection, SessionLost, SessionRefused, failed
from tools.mcp.places import Places
from tools.mcp.settings import ServerSettings

STARTS = max(2, os.cpu_count() or 1)
"""Programs that start at a time: more would compete for the cores, and all of them be late."""

ATTEMPTS = 3
"""Starts of a program before the server is given up."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0


class CallStopped(Exception):
    """A call took too long, or its answer was too large. The text says so, for the model.

    Args:
        restarted: the session was ended with it; the next call begins another.
    """

    def __init__(self, reason: str, *, restarted: bool) -> None:
        super().__init__(reason + ("; its server was started again, and remembers nothing" if restarted else ""))


class McpServer:
    """A server and its sessions in this process."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.limit = RateLimit(settings.rate, settings.workers, name=f"mcp {settings.name}")
        self._places = Places(settings.max_sessions)
        self._starts: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None
        self._shared: tuple[asyncio.AbstractEventLoop, Session] | None = None
        self._open: set[Connection] = set()

    async def session(self) -> Session:
        """Return the session of an episode, or the one that all episodes share."""
        loop = asyncio.get_running_loop()
        if self.settings.shared:
            if self._shared is None or self._shared[0] is not loop:
                self._shared = loop, Session(self, None)
            return self._shared[1]
        episode: Hashable = current_episode() or object()
        with not_counted():
            await self._places.enter(episode)
        session = Session(self, episode)
        try:
            await session.connect()
        except BaseException:
            await session.close()
            raise
        return session

    async def list_tools(self) -> list[Tool]:
        """Return the server's tools, over a session that is closed at once.

        Raises:
            ToolError: the server cannot be used; names it and the cause.
        """
        connection = await self.connect()
        try:
            return await connection.list_tools()
        except (SessionLost, MCPError) as exc:
            raise failed(self.settings, f"its tools cannot be listed: {exc}", "try the server by itself") from None
        finally:
            await self.disconnect(connection)

    async def connect(self) -> Connection:
        """Connect; a program that ends is started again, and a URL is waited for.

        Raises:
            ToolError: final; names the server and the last cause.
        """
        loop = asyncio.get_running_loop()
        begin, pause, attempt = loop.time(), FIRST_PAUSE_S, 0
        if self._starts is None or self._starts[0] is not loop:
            self._starts = loop, asyncio.Semaphore(STARTS if self.settings.command else 16 * STARTS)
        while True:
            attempt += 1
            try:
                async with self._starts[1]:
                    connection = await Connection.open(self.settings)
                self._open.add(connection)
                return connection
            except SessionRefused as exc:
                hint = (
                    "give its token or key in config.headers"
                    if exc.status in (401, 403)
                    else "correct the path of the url: as a rule it is /mcp, or /sse with transport: sse"
                )
                raise failed(self.settings, str(exc), hint) from None
            except SessionLost as exc:
                lasted = loop.time() - begin
                if self.settings.command and attempt >= ATTEMPTS:
                    hint = f"run it by itself: {os.path.basename(self.settings.command)} ..."  # noqa: PTH119
                    what = f"{attempt} starts failed; the last one: {exc}"
                    raise failed(self.settings, what, hint, ToolUnavailable) from None
                if not self.settings.command and lasted + pause > self.settings.outage_s:
                    raise failed(
                        self.settings,
                        f"it has been unavailable for {lasted:.0f} s; last error: {exc}",
                        "start it, or correct the url and its headers; config `outage_s` is how long to wait for it",
                        ToolUnavailable,
                    ) from None
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def disconnect(self, connection: Connection) -> None:
        self._open.discard(connection)
        await connection.close()

    def leave(self, episode: Hashable) -> None:
        self._places.leave(episode)

    def shut_down(self) -> None:
        for connection in list(self._open):
            connection.close_soon()
        self._open.clear()


class Session:
    """A session as the tools use it: it outlives connections."""

    def __init__(self, server: McpServer, episode: Hashable | None) -> None:
        self._server = server
        self._episode = episode
        self._connection: Connection | None = None
        self._lock = asyncio.Lock()
        self._used = False  # the server may remember something

    async def connect(self) -> Connection:
        """Return a connection that is alive.

        Raises:
            ToolError: final: the server cannot be used, or has lost what it remembered.
        """
        async with self._lock:
            connection = self._connection
            if connection is not None and connection.alive:
                return connection
            if connection is not None:
                await self._drop(connection)
                if self._used and self._server.settings.stateful:
                    raise self._forgot("it ended in the middle of an episode")
            with not_counted():  # a start has a time limit of its own
                self._connection = await self._server.connect()
            return self._connection

    async def call(self, name: str, arguments: dict[str, Any]) -> CallToolResult:
        """Call a tool of the server.

        Raises:
            CallStopped: it took too long, or its answer was too large.
            MCPError: the server answered with an error.
            ToolError: the session broke; final if the episode cannot go on without it.
        """
        async with self._server.limit.slot(self._episode or self):
            connection = await self.connect()
            try:
                result = await connection.call(name, arguments)
                self._used = True
                return result
            except SessionLost as exc:
                await self._drop(connection)
                if connection.sent_too_much:
                    self._used = False  # the model learns of it
                    raise CallStopped("the answer was too large, and was not read", restarted=True) from None
                if self._used and self._server.settings.stateful:
                    raise self._forgot(str(exc)) from None
                raise ToolError(f"the MCP server {self._server.settings.name}: {exc}", "see its log") from None
            except TimeoutError:
                self._used = True
                slow = f"it took longer than {self._server.settings.timeout_s:g} s and was stopped"
                if self._server.settings.command is None or await connection.answers():
                    raise CallStopped(slow, restarted=False) from None
                await self._drop(connection)
                self._used = False
                raise CallStopped(slow, restarted=True) from None

    async def close(self) -> None:
        """End the session of an episode; a shared one goes on."""
        if self._episode is None:
            return
        try:
            if self._connection is not None:
                await self._drop(self._connection)
        finally:
            self._server.leave(self._episode)

    async def _drop(self, connection: Connection) -> None:
        if self._connection is connection:
            self._connection = None
        await self._server.disconnect(connection)

    def _forgot(self, cause: str) -> ToolError:
        return failed(
            self._server.settings,
            f"what it remembered of the episode is lost: {cause}",
            "see its log; `stateful: false` in its config starts it again and goes on",
        )
