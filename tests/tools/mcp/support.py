"""Real MCP servers for the tests, and short ways to call them."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from agentloop.tool.session import ToolSession, Toolset
from agentloop.types import Task, ToolCall, ToolResult

SERVER = Path(__file__).with_name("server.py")
RAW = Path(__file__).with_name("raw_server.py")

Load = Callable[..., Toolset]


class Behind:
    """The test server behind HTTP, in a thread; it can be stopped and started on the same port."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/{'mcp' if kind == 'http' else 'sse'}"
        self._server: uvicorn.Server | None = None

    def start(self) -> None:
        build = load_server()
        app = build().streamable_http_app() if self._kind == "http" else build().sse_app()
        settings = uvicorn.Config(
            app, host="127.0.0.1", port=self.port, log_level="error", timeout_graceful_shutdown=0, lifespan="on"
        )
        self._server = server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
        self._thread.start()
        while not server.started and self._thread.is_alive():
            self._thread.join(0.01)

    def stop(self) -> None:
        if self._server is not None:
            self._server.should_exit = self._server.force_exit = True
            self._thread.join(10)


def load_server() -> Callable[..., Any]:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("mcp_test_server", SERVER)
    assert spec is not None and spec.loader is not None
    module = sys.modules.setdefault("mcp_test_server", module_from_spec(spec))
    if not hasattr(module, "build"):
        spec.loader.exec_module(module)
    return module.build  # type: ignore[no-any-return]


def session_of(toolset: Toolset) -> ToolSession:
    return toolset.session(Task("0", "a", []))


async def call(session: ToolSession, name: str, /, **arguments: Any) -> ToolResult:
    return await session.call(ToolCall(name, arguments), 30)
