"""A sandbox server in a thread of the test process, and what tests ask of it."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import uvicorn

from agentloop.wire import bind, url_of
from tools.sandbox.app import create_app
from tools.sandbox.isolation.bubblewrap import Bubblewrap
from tools.sandbox.settings import SandboxSettings

SMALL: dict[str, Any] = {
    "port": 0, "max_running": 4, "warm": 2, "memory_mb": 192, "disk_mb": 8, "max_files": 2000, "max_processes": 24,
    "max_open_files": 64, "max_output_mb": 0.25, "max_run_timeout_s": 20.0, "max_sessions": 3,
}  # fmt: skip


@dataclass
class Sandbox:
    """A client of a running server."""

    url: str
    client: httpx.Client
    app: Any

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self.client.post(self.url + path, json=body)

    def run(self, code: str, language: str = "python", **fields: Any) -> dict[str, Any]:
        answer = self.post("/run_code", {"code": code, "language": language, "run_timeout": 10, **fields})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def printed(self, code: str, language: str = "python", **fields: Any) -> str:
        """Run a program that has to succeed; return what it prints."""
        found = self.run(code, language, **fields)
        assert found["status"] == "Success", found
        text: str = found["run_result"]["stdout"]
        return text

    def wait_for(self, key: str, value: int) -> None:
        """Wait until a number of `/health` has a value."""
        deadline = time.monotonic() + 30
        while self.health()[key] != value:
            assert time.monotonic() < deadline, f"{key} is not {value}: {self.health()}"
            time.sleep(0.02)

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(self.url + "/health").json()
        return found


class Serving:
    """Starts servers, and ends them."""

    def __init__(self) -> None:
        self._ends: list[Any] = []

    def start(self, token: str | None = None, sandboxed: bool = True, **options: Any) -> Sandbox:
        settings = SandboxSettings(**{**SMALL, **options})
        sock = bind("127.0.0.1", 0)
        sock.listen(128)
        launcher = Bubblewrap(settings, sandboxed=sandboxed)
        app = create_app(settings, launcher, token)
        server = uvicorn.Server(uvicorn.Config(app, ws="none", log_config=None, access_log=False))
        # Sandboxes die with the thread that started them: this one.
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        client = httpx.Client(timeout=60, headers={"authorization": f"Bearer {token}"} if token else {})

        def end() -> None:
            client.close()
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the server does not end"
            launcher.close()

        self._ends.append(end)
        return Sandbox(url_of(sock, "127.0.0.1"), client, app)

    def end(self) -> None:
        while self._ends:
            self._ends.pop()()


def descendants() -> dict[int, str]:
    """Return the processes below this one, by number, with their command."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1]), command
    found: dict[int, str] = {}
    for pid in parents:
        above = pid
        while above in parents and above != os.getpid():
            above = parents[above][0]
        if above == os.getpid() and pid != os.getpid():
            found[pid] = parents[pid][1]
    return found


def programs() -> list[str]:
    """Return what runs in sandboxes: the processes below bubblewrap's."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            above = {parent.name() for parent in process.parents()}
            if "bwrap" in above and process.name() != "bwrap" and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


def outcome(sandbox: Sandbox, body: str, **fields: Any) -> Any:
    """Run an attempt; return what it says of itself: `said(value)` prints JSON."""
    code = (
        "import json, os, sys, socket, ctypes, errno\n"
        "def said(value): print('SAID', json.dumps(value), flush=True)\n"
        "def tried(function, *arguments):\n"
        "    try: function(*arguments)\n"
        "    except OSError as exc: return errno.errorcode.get(exc.errno, str(exc))\n"
        "    return 'done'\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def called(name, *arguments):\n"
        "    result = getattr(libc, name)(*arguments)\n"
        "    return errno.errorcode[ctypes.get_errno()] if result == -1 else 'done'\n" + body
    )
    found = sandbox.run(code, **fields)
    lines = [line for line in found["run_result"]["stdout"].splitlines() if line.startswith("SAID ")]
    assert lines, found
    return json.loads(lines[-1][5:])
