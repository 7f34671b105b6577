"""The exporter against servers that answer wrongly, slowly, or under an address with a password."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agentloop.config import WeaveConfig
from agentloop.errors import ConfigError
from agentloop.trace.exporting import ExportRun
from agentloop.trace.store import TraceStore
from agentloop.trace.weave import WeaveExporter
from agentloop.trace.weave.connections import VARIABLES
from tests.agentloop.trace.made_episodes import record
from tests.agentloop.trace.raw_server import ENDLESS
from tests.agentloop.viewer.trace_server import CLOSED

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

    def __init__(self) -> None:
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
        done = subprocess.run(
            [sys.executable, "-c", SEND],
            env={name: value for name, value in environment.items() if value is not None},
            cwd=folder, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and "very-secret" not in done.stdout + done.stderr, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith(("confirmed", "ExportError", "Config"))]


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.server.shutdown()
    started.server.server_close()


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/graphql", "header"),
        ("/file/create", "body"),
        ("/obj/create", "continue"),
        ("/calls/complete", "size of a chunk"),
    ],
)
def test_an_answer_that_does_not_end_is_an_outage(server: Server, tmp_path: Path, path: str, part: str) -> None:
    server.drips, server.end = path, ENDLESS[part]
    tries = server.send(tmp_path, WEAVE_HTTP_TIMEOUT="0.5")
    assert len(tries) == 2 and server.asked
    for line in tries:  # also the second try has its own time
        assert line.startswith("ExportError") and line.endswith("no complete answer within 1 s"), line


def test_the_answer_of_weaves_server_confirms(server: Server, tmp_path: Path) -> None:
    server.answer = b'{"ids": ["a"]}'  # as a later version may answer
    assert server.send(tmp_path) == ["confirmed"] * 2


def test_json_that_names_an_error_confirms_nothing(server: Server, tmp_path: Path) -> None:
    server.answer = b'{"error": "project not found"}'
    for line in server.send(tmp_path):
        assert "not as weave's server" in line and "project not found" in line


def test_no_message_shows_the_password_of_an_address(server: Server, tmp_path: Path) -> None:
    address = server.url.replace("//", "//bob:very-secret@")
    server.answer = b'{"error": "bob may not, very-secret"}'
    tries = server.send(tmp_path, WF_TRACE_SERVER_URL=address, WANDB_BASE_URL=address)  # checks what is printed
    assert len(tries) == 2 and "//(hidden)@127.0.0.1" in tries[0] and server.asked


def test_calls_whose_files_were_not_taken_are_not_confirmed_and_no_log_shows_the_key(
    server: Server, tmp_path: Path
) -> None:
    server.refuses = "/file/create"
    first, _ = server.send(tmp_path, WANDB_API_KEY="very-secret")  # checks what is printed, log included
    assert "it answered 413: too large: (hidden)" in first


@pytest.mark.parametrize("address", ["http://very-secret@h:1/?key=very-secret", "http://bob:very-secret@h:1"])
def test_the_destination_names_no_password(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("WF_TRACE_SERVER_URL", address)
    exporter = WeaveExporter(WeaveConfig(project="lab/runs"), ExportRun("demo", Path("run")))
    assert exporter.destination == "http://(hidden)@h:1 lab/runs"


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize(
    "address", ["http://bob:very-secret/x@h", "http://bob:very?secret@h", "very-secret@h", "http://["]
)
def test_what_is_no_address_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, variable: str, address: str
) -> None:
    monkeypatch.setenv(variable, address)
    with pytest.raises(ConfigError, match=f"{variable} is not an address") as caught:
        WeaveExporter(WeaveConfig(project="lab/runs"), ExportRun("demo", Path("run")))
    assert "very" not in str(caught.value)


def test_an_address_of_wandbs_settings_that_is_none_is_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nbase_url = http://bob:very-secret/@127.0.0.1:9\n")
    tries = server.send(tmp_path, WANDB_BASE_URL=None, WF_TRACE_SERVER_URL=None)
    assert tries == ["ConfigError the address of weave's server is not an address"] * 2
