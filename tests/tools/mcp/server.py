"""An MCP server for the tests, written with the library: `python server.py`, or `build()` behind HTTP."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from typing import Annotated, Any, Literal

import anyio
from mcp.server.mcpserver import Context, Image, MCPServer
from pydantic import BaseModel, Field

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFElEQVR4nGP8z8DAwMDAxMDAwMDAAAANHQEDasKb6QAAAABJRU5ErkJggg=="
)


class Point(BaseModel):
    x: int
    y: int = 0


class Shape(BaseModel):
    kind: Literal["line", "polygon"]
    points: list[Point]
    label: str | None = None


def build(**settings: Any) -> MCPServer:
    server = MCPServer("tests", **settings)
    remembered: list[str] = []

    @server.tool()
    def add(a: int, b: Annotated[int, Field(description="the second")] = 2) -> int:
        """Add two numbers."""
        return a + b

    @server.tool()
    def draw(shape: Shape, scale: float | int = 1) -> str:
        """Draw a shape."""
        return f"{shape.kind} of {len(shape.points)} points at {scale}"

    @server.tool()
    def remember(text: str) -> str:
        """Remember a text; return all."""
        remembered.append(text)
        return " ".join(remembered)

    @server.tool(structured_output=False)
    def picture() -> list[Any]:
        """Return a picture."""
        return ["a picture:", Image(data=PIXEL, format="png")]

    @server.tool()
    async def wait(seconds: float) -> str:
        """Wait."""
        await anyio.sleep(seconds)
        return "done"

    @server.tool()
    def block() -> str:
        """Stop, and answer nothing else."""
        os.kill(os.getpid(), signal.SIGSTOP)
        return "done"

    @server.tool()
    def fail() -> str:
        """Fail."""
        raise ValueError("as asked")

    @server.tool()
    def environment(name: str) -> str:
        """Return a variable."""
        return os.environ.get(name, "not set")

    @server.tool()
    def huge(characters: int) -> str:
        """Return a long text."""
        return "x" * characters

    @server.tool()
    def leave_child() -> int:
        """Start a process that leaves the group."""
        child = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL)
        return child.pid

    @server.tool()
    def die(code: int = 3) -> str:
        """End the server."""
        print("it is going to die", file=sys.stderr, flush=True)
        os._exit(code)

    @server.tool()
    def noise(lines: int, text: str = "not a message") -> str:
        """Print on stdout."""
        for _ in range(lines):
            os.write(1, (text + "\n").encode())
        return "printed"

    @server.tool()
    async def headers(context: Context) -> str:
        """Return the headers of the request."""
        request = context.request_context.request
        return json.dumps(dict(request.headers)) if request is not None else "{}"

    return server


if __name__ == "__main__":
    print("welcome to a server that greets on stdout", flush=True)
    if "--slow" in sys.argv:
        time.sleep(60)
    if "--broken" in sys.argv:
        sys.exit("it cannot start: token " + os.environ.get("TOKEN", ""))
    build().run("stdio")
