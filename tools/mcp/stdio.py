"""The transport to a stdio server: a program that reads and writes one JSON message a line.

The library's own transport keeps a line of any length, and leaves what the program has started
behind when the run is killed. Here a keeper (agentloop/runtime/keeper.py) ends the program and all
of its descendants with the run, a message has a bound, and the end of stderr is kept for errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from mcp.shared.message import SessionMessage
from mcp_types import jsonrpc_message_adapter

from agentloop.errors import ToolConfigError
from agentloop.runtime.child import spawn
from agentloop.text import clean
from tools.mcp.settings import ServerSettings

MOST_BYTES = 2**25
"""Bytes of one message: large images fit."""

MOST_NOISE = 1_000
"""Lines in a row that are not messages. Programs greet on stdout; they do not talk all the time."""

CHUNK = 2**16
GRACE_S = 1.0
"""How long a program may take to end after its stdin is closed."""

KILL_S = 8.0
TAIL_LINES, TAIL_CHARACTERS = 12, 300

INHERITED = (
    "HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "TZ", "USER",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "UV_CACHE_DIR", "XDG_CACHE_HOME",
)  # fmt: skip
"""Variables that a server gets from the run. Its keys and tokens are not among them."""


class Output:
    """What is known about a server: the end of what its program printed, and why it ended; of one
    behind a URL, the HTTP status of its last answer."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.lines: deque[str] = deque(maxlen=TAIL_LINES)
        self.fault: str | None = None
        self.too_large = False
        self.code: int | None = None

    def describe(self) -> str:
        """Return why the program ended, and its last lines, for a message."""
        text = self.fault or (f"it ended with code {self.code}" if self.code is not None else "")
        last = "\n".join(f"    {line}" for line in self.lines)
        return "\n".join(part for part in (text, last and f"Its last lines:\n{last}") if part)

    def add(self, line: bytes) -> None:
        text = clean(line[: 4 * TAIL_CHARACTERS].decode("utf-8", "replace").strip(), TAIL_CHARACTERS)
        if text:
            self.lines.append(text)


def environment_of(settings: ServerSettings) -> dict[str, str]:
    """Return the whole environment of a server: a few variables of the run, and those of `env`."""
    return {**{name: os.environ[name] for name in INHERITED if name in os.environ}, **settings.env}


@asynccontextmanager
async def stdio(settings: ServerSettings, output: Output) -> AsyncGenerator[tuple[Any, Any]]:
    """Start the program; yield the streams of its messages, received and sent.

    Raises:
        ToolConfigError: there is no such program.
    """
    assert settings.command is not None
    environment = environment_of(settings)
    program = shutil.which(settings.command, path=environment.get("PATH"))
    if program is None:
        raise ToolConfigError(
            f"the MCP server {settings.name} cannot be started: the program {settings.command} does not exist",
            "install it, or give its path",
        )
    process = await spawn(
        [program, *settings.args],
        environment=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        kept=True,
        folder=settings.cwd,
    )
    # No await before the task group: a cancellation in between would leave the program behind.
    received, incoming = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    outgoing, sent = anyio.create_memory_object_stream[SessionMessage](0)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_read, process, received, output)
            tasks.start_soon(_write, process, sent, received)
            tasks.start_soon(_keep_tail, process, output)
            try:
                yield incoming, outgoing
            finally:
                with anyio.CancelScope(shield=True):
                    await _end(process)
                    _release_pipes(process)
                tasks.cancel_scope.cancel()
    finally:
        for stream in (received, incoming, outgoing, sent):
            stream.close()


async def _read(process: asyncio.subprocess.Process, received: Any, output: Output) -> None:
    assert process.stdout is not None
    buffer, searched, noise = bytearray(), 0, 0
    with contextlib.suppress(anyio.ClosedResourceError, anyio.BrokenResourceError, ConnectionError):
        async with received:
            while chunk := await process.stdout.read(CHUNK):
                buffer += chunk
                begin = 0
                while (end := buffer.find(b"\n", max(begin, searched))) >= 0:
                    line, begin = bytes(buffer[begin:end]), end + 1
                    message = _message(line)
                    noise = 0 if message is not None else noise + 1
                    if message is not None:
                        await received.send(message)
                    elif noise <= TAIL_LINES:
                        output.add(line)
                del buffer[:begin]
                searched = len(buffer)
                if noise > MOST_NOISE:
                    output.fault = f"it printed more than {MOST_NOISE:,} lines on stdout that are not messages of MCP"
                    return
                if len(buffer) > MOST_BYTES:
                    output.too_large = True
                    output.fault = f"it sent a message of more than {MOST_BYTES >> 20} MB"
                    return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GRACE_S):
                    output.code = await process.wait()


def _message(line: bytes) -> SessionMessage | None:
    """Return the message in a line; None: it is something else, such as a greeting."""
    if not line.lstrip().startswith((b"{", b"[")):
        return None
    try:
        return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValueError:
        return None


async def _write(process: asyncio.subprocess.Process, sent: Any, received: Any) -> None:
    assert process.stdin is not None
    try:
        async with sent:
            async for message in sent:
                text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                process.stdin.write(text.encode("utf-8", "replace") + b"\n")
                await process.stdin.drain()
    except (anyio.ClosedResourceError, anyio.BrokenResourceError, OSError):
        await received.aclose()  # requests in flight see that the connection has ended


async def _keep_tail(process: asyncio.subprocess.Process, output: Output) -> None:
    assert process.stderr is not None
    rest = b""
    while chunk := await process.stderr.read(CHUNK):
        *lines, rest = (rest + chunk).split(b"\n")
        rest = rest[:CHUNK]
        for line in lines[-TAIL_LINES:]:
            output.add(line)
    output.add(rest)


async def _end(process: asyncio.subprocess.Process) -> None:
    """End the program: first by the end of its stdin, then with all of its descendants."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    if await _ended(process, GRACE_S):
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()  # the keeper kills all that the program started
    if not await _ended(process, KILL_S):
        with contextlib.suppress(ProcessLookupError):
            process.kill()


def _release_pipes(process: asyncio.subprocess.Process) -> None:
    """Close the pipes, which a descendant that could not be ended may hold open."""
    transport: Any = getattr(process, "_transport", None)
    if transport is not None:
        with contextlib.suppress(PermissionError, ProcessLookupError):
            transport.close()


async def _ended(process: asyncio.subprocess.Process, seconds: float) -> bool:
    # Not `process.wait()`: it also waits for the pipes, which a descendant may hold open.
    deadline = asyncio.get_running_loop().time() + seconds
    while process.returncode is None:
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True
