"""Headless Chromium, driven over its debugging protocol, for the tests that are marked `browser`."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


class Page:
    """One tab of headless Chromium, spoken to over its debugging protocol. Events are kept in `events`."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._id = 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        self._id += 1
        self._socket.send(json.dumps({"id": self._id, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == self._id:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def open(
        self, target: Path | str, *, width: int = 1280, height: int = 900, scheme: str = "light", zoom: float = 1
    ) -> None:
        """Load a file or a URL in a fresh document. `zoom` magnifies it as a reader does."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=int(width / zoom), height=int(height / zoom),
            deviceScaleFactor=zoom, mobile=width < 600,
        )  # fmt: skip
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        url = target.as_uri() if isinstance(target, Path) else target
        self.call("Page.navigate", url="about:blank")  # another fragment of the same page would not load it again
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.protocol !== 'about:'", "the page did not load")

    def run(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str, problem: str = "", *, seconds: float = 30) -> Any:
        """Wait until an expression is true, and return its value."""
        deadline = time.monotonic() + seconds
        by_value = f"(value => value instanceof Node ? true : value)({expression})"
        while not (value := self.run(by_value)):
            if time.monotonic() > deadline:
                shown = self.run("location.href + String.fromCharCode(10) + document.body?.textContent.slice(0, 500)")
                raise AssertionError(f"{problem or expression}: {shown}\n{self.problems()}")
            time.sleep(0.05)
        return value

    def text(self, selector: str) -> str:
        """Wait for an element, and return its text."""
        return str(self.wait(f"document.querySelector({json.dumps(selector)})?.textContent"))

    def press(self, *keys: str) -> None:
        """Press keys one after another; a letter types itself."""
        for key in keys:
            text = key if len(key) == 1 else {"Enter": "\r"}.get(key, "")
            code = {"Escape": 27, "Enter": 13, "Tab": 9}.get(key, 0)  # what the browser itself acts on
            fields = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **fields)
            self.call("Input.dispatchKeyEvent", type="keyUp", **fields)

    def problems(self) -> list[dict[str, Any]]:
        """Return exceptions and console errors so far."""
        shown = ("Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event["method"] in shown]

    def point_at(self, selector: str) -> None:
        """Scroll to an element and move the mouse over its middle."""
        middle = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "document.documentElement.style.scrollBehavior = 'auto'; e.scrollIntoView({block: 'center'});"
            "const r = e.getBoundingClientRect(); return [r.left + r.width / 2, r.top + r.height / 2]; })()"
        )
        time.sleep(0.2)  # the scroll event hides the tooltip: let it pass
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=middle[0], y=middle[1])
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=middle[0] + 1, y=middle[1])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def chromium(program: str, profile: Path) -> Iterator[Page]:
    """A browser of its own; ended at the end."""
    import httpx
    from websockets.sync.client import connect

    process = subprocess.Popen(
        [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port_file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not port_file.is_file() or not port_file.read_text().strip():
            assert process.poll() is None and time.monotonic() < deadline, "Chromium did not start"
            time.sleep(0.1)
        port = port_file.read_text().split()[0]
        targets = httpx.get(f"http://127.0.0.1:{port}/json/list", timeout=30, trust_env=False).json()
        with connect(next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page"), max_size=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(timeout=30)


def find_program() -> str:
    """Return the browser of this machine; skip the test if there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    return program
