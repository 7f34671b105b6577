"""`Connection`: one client session with a server, owned by one task."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from http import HTTPStatus
from typing import Any

import anyio
from mcp import Client, MCPError
from mcp_types import CONNECTION_CLOSED, CallToolResult, Implementation, Tool

from agentloop.errors import ToolConfigError, ToolError
from agentloop.tool.secrets import hide
from tools.mcp.remote import remote
from tools.mcp.settings import ServerSettings
from tools.mcp.stdio import Output, stdio

CLOSE_S = 15.0
PROBE_S = 5.0
MOST_PAGES, MOST_TOOLS = 100, 1_000

REFUSALS = frozenset({401, 403, 404, 405, 410})
"""Statuses of a service that runs, and wants another address or a token."""

LOST = (anyio.ClosedResourceError, anyio.BrokenResourceError, anyio.EndOfStream, ConnectionError)


class SessionLost(Exception):
    """The session has ended, or its server cannot be reached; the text says why."""


class SessionRefused(SessionLost):
    """A server that runs refuses sessions at this address, which waiting does not change.

    Args:
        status: of HTTP.
    """

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


class Connection:
    """A session. A task of its own enters and leaves it, as the library requires.

    Attributes:
        calls: calls that were answered.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.calls = 0
        self._output = Output()
        self._client: Client | None = None
        self._over = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._cause: BaseException | None = None
        # Without the context of the episode that happens to open it.
        self._task = asyncio.create_task(self._own(), name=f"mcp {settings.name}", context=contextvars.Context())

    @classmethod
    async def open(cls, settings: ServerSettings) -> Connection:
        """Connect.

        Raises:
            SessionLost: the server cannot be reached, ended, or took longer than its start may.
            SessionRefused: a service answered that it has no such address, or wants a token.
            ToolConfigError: its program does not exist.
        """
        connection = cls(settings)
        try:
            async with asyncio.timeout(settings.start_timeout_s):
                await asyncio.shield(connection._ready)
        except TimeoutError:
            reason = connection._told(f"it did not answer within {settings.start_timeout_s:g} s")
            await connection.close()
            raise SessionLost(reason) from None
        except BaseException:
            await connection.close()
            raise
        return connection

    @property
    def alive(self) -> bool:
        return self._client is not None and not self._task.done() and not self._over.is_set()

    @property
    def sent_too_much(self) -> bool:
        """Whether it ended because of an answer that is too large."""
        return self._output.too_large

    async def call(self, name: str, arguments: dict[str, Any]) -> CallToolResult:
        """Call a tool.

        Raises:
            SessionLost: the session has ended.
            MCPError: the server answered with an error.
            TimeoutError: it did not answer in time; the call is cancelled there.
        """
        client = self._client
        if client is None or not self.alive:
            raise SessionLost(self._told("the session has ended"))
        call = asyncio.ensure_future(client.call_tool(name, arguments))
        try:
            # A session that ends answers its calls, as a rule; its end is watched all the same.
            async with asyncio.timeout(self.settings.timeout_s):
                await asyncio.wait({call, self._task}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise SessionLost(self._told("the session has ended"))
            result = call.result()
        except MCPError as exc:
            if _closed(exc):
                raise SessionLost(self._told("the connection was closed")) from None
            raise
        except LOST as exc:
            raise SessionLost(self._told(f"the connection broke: {type(exc).__name__}")) from None
        finally:
            call.cancel()
        self.calls += 1
        return result

    async def list_tools(self) -> list[Tool]:
        """Return all tools of the server.

        Raises:
            SessionLost, MCPError: as `call`.
            ToolConfigError: there is no end of them.
        """
        client = self._client
        assert client is not None
        found: list[Tool] = []
        cursor: str | None = None
        for _ in range(MOST_PAGES):
            try:
                async with asyncio.timeout(self.settings.start_timeout_s):
                    page = await client.list_tools(cursor=cursor)
            except TimeoutError:
                raise SessionLost(self._told("it did not list its tools in time")) from None
            except LOST as exc:
                raise SessionLost(self._told(f"the connection broke: {type(exc).__name__}")) from None
            except MCPError as exc:
                if _closed(exc):
                    raise SessionLost(self._told("the connection was closed")) from None
                raise
            found += page.tools
            cursor = page.next_cursor
            if not cursor or len(found) > MOST_TOOLS:
                break
        if cursor or len(found) > MOST_TOOLS:
            raise ToolConfigError(
                f"the MCP server {self.settings.name} lists more than {MOST_TOOLS:,} tools", "use another server"
            )
        return found

    async def answers(self) -> bool:
        """Whether the server still answers anything, after a call that took too long."""
        client = self._client
        if client is None or not self.alive:
            return False
        with contextlib.suppress(TimeoutError, MCPError, *LOST):
            async with asyncio.timeout(PROBE_S):
                await client.list_tools()
                return True
        return False

    async def close(self) -> None:
        """End the session, and the program with all that it started."""
        self._over.set()
        if not self._ready.done() or self._client is None:
            self._task.cancel()
        done, _ = await asyncio.wait({self._task}, timeout=CLOSE_S)
        if not done:
            self._task.cancel()

    def close_soon(self) -> None:
        """The same, from any thread, without waiting."""
        with contextlib.suppress(RuntimeError):  # its event loop is closed, and the task with it
            self._loop.call_soon_threadsafe(self._over.set)

    async def _own(self) -> None:
        transport = stdio(self.settings, self._output) if self.settings.command else remote(self.settings, self._output)
        info = Implementation(name="agentloop", version="1")
        try:
            async with Client(transport, cache=None, client_info=info) as client:
                self._client = client
                if not self._ready.done():
                    self._ready.set_result(None)
                await self._over.wait()
        except asyncio.CancelledError:
            raise
        except BaseException as exc:  # noqa: BLE001  # groups of what the library's tasks raise
            self._cause = _first(exc)
        finally:
            self._over.set()
            if not self._ready.done():
                cause = self._cause
                self._ready.set_exception(cause if isinstance(cause, ToolConfigError) else self._not_begun())
                self._ready.exception()  # retrieved: nobody may be waiting

    def _not_begun(self) -> SessionLost:
        status = self._output.status
        if status in REFUSALS:
            return SessionRefused(f"the service at this address answered {status} {HTTPStatus(status).phrase}", status)
        return SessionLost(self._told("it did not start"))

    def _told(self, what: str) -> str:
        """Return a message without secrets: what happened, the cause, the end of its output."""
        cause = f": {type(self._cause).__name__}: {self._cause}" if self._cause is not None else ""
        rest = self._output.describe()
        return hide(f"{what}{cause}" + (f"; {rest}" if rest else ""), self.settings.secrets)


def failed(settings: ServerSettings, what: str, hint: str, kind: type[ToolError] = ToolError) -> ToolError:
    """Return the error of a server that cannot be used; final."""
    return kind(f"the MCP server {settings.name}: {what}", hint, final=True)


def _closed(exc: MCPError) -> bool:
    """Whether the library found the connection closed; servers use its code for other errors."""
    return exc.code == CONNECTION_CLOSED and exc.message == "Connection closed"


def _first(exc: BaseException) -> BaseException:
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc
