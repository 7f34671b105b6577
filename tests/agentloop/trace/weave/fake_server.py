"""A server that answers weave's client in this process, rightly, wrongly or slowly."""

from __future__ import annotations

import base64
import os
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from agentloop.trace.store import TraceStore
from tests.agentloop.trace.made_episodes import record
from tests.agentloop.trace.raw_server import ENDLESS
from tests.agentloop.viewer.trace_server import CLOSED
from tests.forked_programs import ForkedPrograms

SEND = """
from pathlib import Path
from agentloop.config import WeaveConfig
from agentloop.errors import AgentloopError
from agentloop.trace.exporting import ExportRun, episodes_of, load_exporter
from agentloop.trace.store import TraceStore

run = ExportRun("demo", Path(), "policy")
exporter = load_exporter("weave")(WeaveConfig(project="lab/runs"), run)
for _ in range(2):
    try:
        exporter.export(list(episodes_of(run, TraceStore(run.folder).records(7, "train"))))
        print("confirmed")
    except AgentloopError as exc:
        print(type(exc).__name__, exc.message)
"""
"""Sends an episode twice in a process of its own, into which weave is imported."""

ANSWER = b'{"digest": "d", "data": {"project": {"name": "runs"}}}'
"""What weave's client needs to know of other requests than those of calls."""


class Server:
    """Answers calls with `answer`, and what is not of calls as weave's server does.

    Attributes:
        drips: the part of the paths to which the answer has no end.
        refuses: the part of the paths to which the answer is an error that shows the key.
        asked: paths.
    """

    def __init__(self, programs: ForkedPrograms) -> None:
        self._programs = programs
        self.answer = b"{}"
        self.drips: str | None = None
        self.refuses: str | None = None
        self.end: Callable[[socket.socket], None] = ENDLESS["header"]
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                server.asked.append(self.path)
                if server.drips is not None and server.drips in self.path:
                    try:
                        server.end(self.connection)
                    except OSError:
                        self.close_connection = True
                        return
                content = server.answer if self.path.endswith("/calls/complete") else ANSWER
                refused = server.refuses is not None and server.refuses in self.path
                if refused:
                    key = self.headers["authorization"]
                    content = f"too large: {key} {base64.b64decode(key.split()[1]).decode()}".encode()
                self.send_response(413 if refused else 200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def send(self, folder: Path, **variables: str | None) -> list[str]:
        """Send to this server; return what came of it, by try."""
        TraceStore(folder).write(7, "train", [record(7, "g1")])
        printed = self.run(SEND, folder, **variables)
        return [line for line in printed if line.startswith(("confirmed", "ExportError", "Config"))]

    def run(self, program: str, folder: Path, **variables: str | None) -> list[str]:
        """Run a Python program that sends to this server; return the lines that it prints."""
        environment = {
            **os.environ,
            "WF_TRACE_SERVER_URL": self.url,
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": "local",
            "WEAVE_RETRY_MAX_ATTEMPTS": "1",
            "HTTPS_PROXY": CLOSED,
            "NO_PROXY": "127.0.0.1",
            **variables,
        }
        given = {name: value for name, value in environment.items() if value is not None}
        done = self._programs.run(program, environment=given, cwd=folder)
        assert done.returncode == 0 and "very-secret" not in done.stdout + done.stderr, done.stderr
        return done.stdout.splitlines()
