"""The page in a real browser: no script error, no request, nothing of the model's text executed."""

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

from agentloop.report import write_report

pytestmark = pytest.mark.browser

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

    def open(self, path: Path, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + 30
        while not self.run("document.readyState === 'complete' && location.protocol === 'file:'"):
            assert time.monotonic() < deadline, "the page did not load"
            time.sleep(0.05)

    def run(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

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


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with chromium(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (375, "light")])
def test_the_page_runs_without_errors_requests_or_sideways_scrolling(
    page: Page, hostile_run: Path, width: int, scheme: str
) -> None:
    page.events.clear()
    page.open(write_report(hostile_run), width=width, scheme=scheme)
    assert page.run("document.querySelectorAll('.plot svg path').length") > 15
    assert page.run("document.querySelectorAll('.traj').length") >= 10
    assert page.run("document.querySelector('#tip').hidden")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run("document.images.length") == 0
    assert page.run("document.querySelectorAll('script').length") == 2
    problems = [e for e in page.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert problems == []
    asked = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_pointing_at_a_plot_shows_the_values_of_the_nearest_step(page: Page, hostile_run: Path) -> None:
    page.open(write_report(hostile_run))
    page.point_at("[data-plot='0']")
    assert page.run("document.querySelector('#tip .head').textContent") == "step 15"
    assert "training" in page.run("document.querySelector('#tip').textContent")
    assert page.run("[...document.querySelectorAll('.cursor')].every(cursor => !cursor.hidden)")


def test_arrow_keys_walk_along_a_plot(page: Page, hostile_run: Path) -> None:
    page.open(write_report(hostile_run))
    page.run("document.querySelector('[data-plot]').focus()")
    for _ in range(3):
        page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", code="ArrowRight")
    assert page.run("document.querySelector('#tip .head').textContent") == "step 2"


def test_pointing_at_a_sampled_token_shows_its_id_logprob_and_version(page: Page, hostile_run: Path) -> None:
    page.open(write_report(hostile_run))
    page.point_at(".tokens .sampled .text > i")
    tip = page.run("document.querySelector('#tip').textContent")
    assert "sampled by the model" in tip
    data = json.loads(page.run("document.querySelector('#data').textContent"))["trajectories"][0]
    first = data["v"].index(next(v for v in data["v"] if v is not None))
    for fact in (f"token id{data['ids'][first]}", f"position{first}", f"logprob{data['lp'][first]:.4f}"):
        assert fact in tip
    page.point_at(".tokens .prompt .text > i")
    assert "shown to the model" in page.run("document.querySelector('#tip').textContent")
