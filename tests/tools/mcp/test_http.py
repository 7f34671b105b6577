"""MCP servers behind a URL: streamable HTTP and SSE."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agentloop.errors import ToolConfigError, ToolError
from agentloop.tool.loading import load_toolset
from tests.tools.mcp.support import Behind, Load, call, session_of


async def test_tools_of_a_url_are_called_with_its_headers(
    behind: Behind, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_KEY", "s3cret-value")
    transport = "sse" if behind.url.endswith("sse") else "http"
    headers = {"Authorization": "Bearer ${oc.env:SERVICE_KEY}", "X-Team": "blue"}
    toolset = load(url=behind.url, transport=transport, headers=headers, tools=["add", "headers", "wait"], timeout=3)
    assert list(toolset.tools) == ["add", "wait", "headers"]

    session = session_of(toolset)
    assert (await call(session, "add", a="3")).text == "5"
    sent = json.loads((await call(session, "headers")).text)
    assert sent["authorization"] == "Bearer (hidden)" and sent["x-team"] == "blue"
    assert "took longer than 3 s" in (await call(session, "wait", seconds=9.0)).text
    assert (await call(session, "add", a=1)).text == "3"
    await session.close()


async def test_a_server_that_returns_is_reconnected(behind: Behind, load: Load) -> None:
    transport = "sse" if behind.url.endswith("sse") else "http"
    toolset = load(url=behind.url, transport=transport, session="shared", tools=["add"], outage_s=0.5)
    session = session_of(toolset)
    assert (await call(session, "add", a=1)).text == "3"
    behind.stop()
    with pytest.raises(ToolError, match=r"the MCP server http://127.0.0.1.*: it has been unavailable for .*error") as e:
        await call(session, "add", a=1)
    assert e.value.final
    behind.start()
    assert (await call(session, "add", a=2)).text == "4"


def test_the_file_of_other_frameworks_loads_unchanged(behind: Behind, tmp_path: Path) -> None:
    server = {"url": behind.url, "type": "sse" if behind.url.endswith("sse") else "http", "auth_token": "my-own-token"}
    (tmp_path / "mcp_server.json").write_text(json.dumps({"mcpServers": {"Calculator Expert": server}}))
    (tmp_path / "tools.yaml").write_text(
        "tools:\n"
        "  - class_name: verl.tools.mcp_search_tool.MCPSearchTool\n"
        "    config: {rate_limit: 120, timeout: 120, type: mcp}\n"
        "    mcp:\n"
        f"      mcp_servers_config_path: {tmp_path / 'mcp_server.json'}\n"
        "      tool_selected_list: [add, remember]\n"
    )
    toolset = load_toolset(tmp_path / "tools.yaml")
    assert list(toolset.tools) == ["add", "remember"]
    assert "my-own-token" in toolset.tools["add"].secrets


async def test_text_that_no_message_can_hold_leaves_the_session_alone(behind: Behind, load: Load) -> None:
    transport = "sse" if behind.url.endswith("sse") else "http"
    session = session_of(load(url=behind.url, transport=transport, tools=["remember", "add"], timeout=5))
    assert (await call(session, "remember", text="half \ud83d")).error is None
    assert (await call(session, "add", a=1)).text == "3"
    await session.close()


def test_a_packed_answer_is_refused(load: Load) -> None:
    """Some kilobytes of it are gigabytes, which the library would unpack at once."""
    bomb = gzip.compress(b" " * (64 * 2**20))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: GZIP\r\nContent-Length: %d\r\n\r\n"
    encodings: list[bytes] = []

    def serve(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    encodings.extend(re.findall(rb"(?i)accept-encoding: *(.*?)\r\n", connection.recv(65536)))
                    connection.sendall(head % len(bomb) + bomb)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/mcp"
        with pytest.raises(ToolConfigError, match="an answer packed as 'gzip', which was not asked for"):
            load(url=url, outage_s=0.1, start_timeout=5)
    assert encodings and set(encodings) == {b"identity"}


@pytest.mark.parametrize("transport", ["http", "sse"])
@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "config.headers"), (403, "config.headers"), (404, "correct the path"), (405, "correct the path")],
)
def test_a_service_that_refuses_is_not_waited_for(load: Load, transport: str, status: int, hint: str) -> None:
    asked: list[str] = []

    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.command)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ToolConfigError, match=f"the service at this address answered {status} ") as caught:
            load(url=f"http://127.0.0.1:{server.server_port}/x", transport=transport, outage_s=30)
        server.shutdown()
    assert hint in (caught.value.hint or "")
    # The client opens a session, and ends it. It does not ask again until `outage_s` is over.
    assert len(asked) == {"http": 2, "sse": 1}[transport]


def test_a_url_without_a_server_is_named(load: Load) -> None:
    with pytest.raises(ToolConfigError, match=r"tool 1: the MCP server http://127.0.0.1:9/mcp: it has been unavail"):
        load(url="http://user:pass@127.0.0.1:9/mcp?key=abc", outage_s=0.1)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "names no server"),
        ({"url": "http://x", "command": "y"}, "tool 1 has both a command and a url"),
        (
            {"command": "no-such-server --local-timezone UTC"},
            "has arguments in it\n  fix: write command: [no-such-server, --local-timezone, UTC], or command: no-such-s",
        ),
        ({"command": "./no-such-server --x"}, "write command: [./no-such-server, --x], or"),
        ({"url": "ftp://x"}, "not an HTTP address"),
        ({"url": "http://x", "transport": "websocket"}, "one of: http, sse"),
        ({"url": "http://x", "env": {"a": "b"}}, "belong to a command"),
        ({"command": "y", "headers": {"a": "b"}}, "headers belong to a url"),
        ({"command": []}, "is not a list of words"),
        ({"command": ["no-such-program-here"]}, "the program no-such-program-here does not exist"),
        ({"command": ["python"], "cwd": "./nowhere"}, "is not a folder"),
        ({"command": ["python"], "tools": "add"}, "config.tools is not a list"),
        ({"command": ["python"], "prefix": "a b"}, "config.prefix"),
        ({"command": ["python"], "sesion": "shared"}, "did you mean 'session'"),
        ({"servers_file": "none.json"}, "none.json: No such file"),
        ({"mcp": {"config": 1}}, "mcp names no file"),
    ],
)
def test_a_wrong_config_is_named(load: Load, config: dict[str, Any], says: str) -> None:
    with pytest.raises(ToolConfigError) as caught:
        load(**config)
    assert says in str(caught.value) and caught.value.hint
