"""One tab of headless Chromium, spoken to over its debugging protocol."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
)  # fmt: skip


def find_chromium() -> str | None:
    """The browser's program, if it is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """A tab of 1280 x 900."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._id = 0
        self.call("Page.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)

    def call(self, method: str, **parameters: Any) -> Any:
        """Send a command; return its result."""
        self._id += 1
        self._socket.send(json.dumps({"id": self._id, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=120))
            if message.get("id") == self._id:
                if "error" in message:
                    raise SystemExit(f"Chromium: {method}: {message['error']}")
                return message["result"]

    def open(self, url: str) -> None:
        """Load a page, from the network."""
        self.call("Page.navigate", url=url)

    def run(self, expression: str, *, wait: bool = False) -> Any:
        """Evaluate JavaScript; `wait`: until its promise is kept."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=wait)
        if "exceptionDetails" in answer:
            raise SystemExit(f"in the page: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until JavaScript is true."""
        deadline = time.monotonic() + 60
        while not self.run(f"!!({condition})"):
            if time.monotonic() > deadline:
                raise SystemExit(f"the page did not become ready: {condition}")
            time.sleep(0.02)


@contextlib.contextmanager
def chromium(program: str, profile: Path) -> Iterator[Page]:
    """A browser of its own; ended at the end."""
    from websockets.sync.client import connect

    command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            port_file = profile / "DevToolsActivePort"
            deadline = time.monotonic() + 60
            while not port_file.is_file() or not port_file.read_text().strip():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("Chromium did not start")
                time.sleep(0.1)
            port = port_file.read_text().split()[0]
            tabs = httpx.get(f"http://127.0.0.1:{port}/json/list", timeout=30, trust_env=False).json()
            address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            with connect(address, max_size=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
            process.wait(30)
