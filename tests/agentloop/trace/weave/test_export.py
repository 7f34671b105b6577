"""The exporter against a real trace server; read back by an unmodified weave client."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agentloop.config import WeaveConfig
from agentloop.errors import ExportError
from agentloop.trace.exporting import ExportRun, TracedEpisode, episodes_of
from agentloop.trace.sender.serving import MEMORY_BYTES
from agentloop.trace.weave import WeaveExporter
from agentloop.trace.weave.client import _cause, check_answer
from tests.agentloop.trace.made_episodes import record, step_of
from tests.agentloop.viewer.trace_server import TraceServer

READ = """
import json, sys, weave
client = weave.init("lab/runs")
query = {"$expr": {"$eq": [{"$getField": "attributes.step"}, {"$literal": int(sys.argv[1])}]}}
calls = list(client.get_calls(query=query))
def plain(value):
    if isinstance(value, dict): return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)): return [plain(v) for v in value]
    return value if isinstance(value, (str, int, float, type(None))) else f"{type(value).__name__}"
print(json.dumps([{"id": c.id, "parent": c.parent_id, "trace": c.trace_id, "op": c.op_name.split("/")[-1].split(":")[0],
    "name": c.display_name, "inputs": plain(dict(c.inputs)), "output": plain(c.output), "exception": c.exception,
    "attributes": {k: v for k, v in c.attributes.items() if k != "weave"}, "status": c.summary["weave"]["status"].value,
    "usage": c.summary.get("usage"), "ms": (c.ended_at - c.started_at).total_seconds() * 1000} for c in calls]))
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TraceServer]:
    started = TraceServer(tmp_path / "runs")
    for name, value in started.variables().items():
        if name.startswith(("WANDB", "WF_", "WEAVE")):
            monkeypatch.setenv(name, value)
    yield started
    started.stop()


def read(server: TraceServer, step: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-c", READ, str(step)]
    done = subprocess.run(command, env=server.variables(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_episodes_are_read_back_as_trees_and_once(server: TraceServer, tmp_path: Path) -> None:
    run = ExportRun("demo", tmp_path, "policy", rollout_n=2)
    exporter = WeaveExporter(WeaveConfig(project="lab/runs"), run)
    failed = record(7, "g1", text="語 \ud800 <script>")
    tool = next(span for span in failed.trajectory.spans if span.name == "tool")
    tool.status, tool.error, tool.end_ns = "error", "ValueError: division by zero", tool.start_ns + 250_000_000
    picture = {"type": "image", "image": Image.new("RGB", (3, 3), (0, 128, 0))}
    failed.trajectory.messages[1]["content"] = [picture, {"type": "text", "text": "how many?"}]
    episodes = [*episodes_of(run, step_of(6, 2)), TracedEpisode(run, (failed,))]
    exporter.export(episodes)
    exporter.export(episodes)
    exporter.close(1.0)

    assert len(read(server, 6)) == 4 * 7
    found = {call["id"]: call for call in read(server, 7)}
    assert len(found) == 7, "sent twice, stored once"
    roots = [call for call in found.values() if call["parent"] is None]
    assert [(root["op"], root["id"] == root["trace"]) for root in roots] == [("episode", True)]
    assert all(call["parent"] in found for call in found.values() if call["parent"] is not None)
    assert {call["trace"] for call in found.values()} == {roots[0]["id"]}
    assert roots[0]["attributes"]["step"] == 7
    assert roots[0]["attributes"]["group_id"] == "g1"
    assert roots[0]["output"]["message"]["content"] == "語 ? <script>"
    assert roots[0]["output"]["reward"] == 1.0
    assert roots[0]["inputs"]["messages"][1]["content"][1] == "how many?"
    assert roots[0]["inputs"]["messages"][1]["content"][0]["image"].endswith("ImageFile")
    assert roots[0]["usage"]["policy"]["completion_tokens"] == 11, "the sum of both generations"
    failure = next(call for call in found.values() if call["op"] == "tool")
    assert json.loads(failure["exception"])["type"] == "ValueError"
    assert (failure["status"], failure["ms"]) == ("error", 250)
    assert roots[0]["status"] == "descendant_error"


def test_an_outage_is_an_error_and_the_next_try_completes(server: TraceServer, tmp_path: Path) -> None:
    run = ExportRun("demo", tmp_path, "policy", rollout_n=2)
    exporter = WeaveExporter(WeaveConfig(project="lab/runs"), run)
    first, second = episodes_of(run, step_of(6, 1, samples=2))
    exporter.export([first])
    port = int(server.url.rpartition(":")[2])
    server.stop()
    with pytest.raises(ExportError, match="cannot be reached: Connection refused"):
        exporter.export([first, second])
    again = TraceServer(tmp_path / "runs", port=port)
    try:
        exporter.export([first, second])
        assert len(read(again, 6)) == 14
    finally:
        again.stop()


def test_the_process_is_replaced_when_it_dies_and_ends_with_the_exporter(server: TraceServer, tmp_path: Path) -> None:
    run = ExportRun("demo", tmp_path, "policy", rollout_n=2)
    exporter = WeaveExporter(WeaveConfig(project="lab/runs"), run)
    episodes = episodes_of(run, step_of(6, 1, samples=1))
    exporter.export(episodes)
    first = exporter._process.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    exporter.export(episodes)
    second = exporter._process.pid
    assert second is not None and second != first
    server.process.send_signal(signal.SIGSTOP)  # an answer never comes
    failed: list[Exception] = []

    def export() -> None:
        try:
            exporter.export(episodes)
        except ExportError as exc:
            failed.append(exc)

    sending = threading.Thread(target=export)
    sending.start()
    time.sleep(0.3)
    exporter.close(1.0)
    sending.join(20)
    assert not sending.is_alive() and "its process ended" in str(failed[0])
    assert not Path(f"/proc/{second}").exists()
    with pytest.raises(ExportError, match="is closed"):
        exporter.export(episodes)


def test_the_library_is_not_imported_by_the_run(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from agentloop.config import WeaveConfig; "
        "from agentloop.trace.exporting import ExportRun, load_exporter; "
        "load_exporter('weave')(WeaveConfig(project='p'), ExportRun('demo', Path('x'))); "
        "print([m for m in ('weave', 'PIL', 'opentelemetry') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "[]"


def test_a_login_page_confirms_nothing_and_shows_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    httpx = pytest.importorskip("httpx")
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    request = httpx.Request("POST", "http://weave", headers={"authorization": "Basic YXBpOnZlcnktc2VjcmV0"})

    def answer(status: int, text: str, kind: str) -> Any:
        headers = {"content-type": kind, "location": "https://login.example/very-secret?x=1"}
        return httpx.Response(status, text=text, headers=headers, request=request)

    check_answer("weave", answer(200, "{}", "application/json"))
    for wrong in (
        answer(200, "<html>very-secret YXBpOnZlcnktc2VjcmV0", "text/html"),
        answer(200, "[]", "application/json"),
        answer(200, "very-secret", "application/json"),
        answer(302, "{}", "application/json"),
    ):
        with pytest.raises(ExportError, match="not as weave's server") as caught:
            check_answer("weave", wrong)
        assert "secret" not in str(caught.value) and "YXBpO" not in str(caught.value) and not caught.value.final
        error = RuntimeError()
        error.response = wrong  # type: ignore[attr-defined]
        assert "secret" not in _cause(error) and "YXBpO" not in _cause(error)
    assert _cause(error).startswith("it redirects to https://login.example/(hidden):")


def test_a_redirect_of_the_calls_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            asked.append(self.path)
            away = self.path.endswith("/calls/complete")
            content = b"" if away else b'{"digest": "d"}'
            self.send_response(302 if away else 200)
            self.send_header("location", "/login")
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("WF_TRACE_SERVER_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "local")
    run = ExportRun("demo", tmp_path, "policy", rollout_n=2)
    exporter = WeaveExporter(WeaveConfig(project="lab/runs"), run)
    try:
        with pytest.raises(ExportError, match="it redirects to /login"):
            exporter.export(episodes_of(run, step_of(6, 1, samples=1)))
    finally:
        exporter.close(1.0)
        server.shutdown()
        server.server_close()
    assert "/login" not in asked


def test_the_process_ends_with_a_run_that_is_killed_while_the_server_hangs(tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))  # it takes connections and never answers
    listener.settimeout(120)
    code = (
        "import sys; from pathlib import Path; from agentloop.config import WeaveConfig; "
        "from agentloop.trace.exporting import ExportRun; from agentloop.trace.weave import WeaveExporter; "
        "exporter = WeaveExporter(WeaveConfig(project='lab/runs'), ExportRun('demo', Path(sys.argv[1]))); "
        "print(exporter._process._running().process.pid, flush=True); exporter.export([])"
    )
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    variables = os.environ | {"WANDB_BASE_URL": url, "WF_TRACE_SERVER_URL": url, "WANDB_API_KEY": "local"}
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=variables, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = os.pidfd_open(int(parent.stdout.readline()))
    connection, _ = listener.accept()  # the process waits for an answer
    limits = Path(f"/proc/{_pid_of(child)}/limits").read_text()
    assert str(MEMORY_BYTES) in next(line for line in limits.splitlines() if line.startswith("Max address space"))
    parent.kill()
    parent.wait()
    ended, _, _ = select.select([child], [], [], 30)
    if not ended:
        signal.pidfd_send_signal(child, signal.SIGKILL)
    for closing in (connection, listener, parent.stdout):
        closing.close()
    os.close(child)
    assert ended


def _pid_of(descriptor: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pid:")).split()[1])
