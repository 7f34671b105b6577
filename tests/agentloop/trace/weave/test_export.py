"""The exporter against a real trace server; read back by an unmodified weave client."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agentloop.config import TraceConfig, WeaveConfig
from agentloop.errors import ExportError
from agentloop.trace.exporting import ExportRun, load_destinations
from agentloop.trace.exports import ExportLog
from agentloop.trace.record import TraceRecord
from agentloop.trace.sender import SpanSender
from agentloop.trace.store import TraceStore
from agentloop.trace.weave.client import _cause, check_answer
from tests.agentloop.trace.made_episodes import record, step_of
from tests.agentloop.viewer.trace_server import TraceServer
from tests.forked_programs import ForkedPrograms

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


@pytest.fixture
def read(weave_programs: ForkedPrograms, tmp_path: Path) -> Callable[[TraceServer, int], list[dict[str, Any]]]:
    def read(server: TraceServer, step: int) -> list[dict[str, Any]]:
        done = weave_programs.run(READ, str(step), environment=server.variables(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return found

    return read


@pytest.fixture
def run(tmp_path: Path) -> ExportRun:
    return ExportRun("demo", tmp_path / "run", "policy", rollout_n=2)


@pytest.fixture
def start(run: ExportRun) -> Iterator[Callable[[], tuple[SpanSender, list[str]]]]:
    """Start a process that sends to weave: the library stays out of that of the tests."""
    senders: list[SpanSender] = []

    def start() -> tuple[SpanSender, list[str]]:
        config, said = TraceConfig(weave=WeaveConfig(project="lab/runs")), list[str]()
        senders.append(SpanSender(load_destinations(config, run), config, run, warn=said.append, yields=False))
        return senders[-1], said

    yield start
    for sender in senders:
        sender.close(0)


def write(run: ExportRun, sender: SpanSender, step: int, records: Sequence[TraceRecord]) -> None:
    TraceStore(run.folder).write(step, "train", records)
    sender.submit(step, "train")


def sent(run: ExportRun) -> int:
    log = ExportLog(run.folder / "traces")
    try:
        return sum(log.counts().values())
    finally:
        log.close()


def wait_for(sender: SpanSender, condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)
        sender.report()


def test_episodes_are_read_back_as_trees_and_once(server: TraceServer, run: ExportRun, start: Any, read: Any) -> None:
    failed = record(7, "g1", text="語 \ud800 <script>")
    tool = next(span for span in failed.trajectory.spans if span.name == "tool")
    tool.status, tool.error, tool.end_ns = "error", "ValueError: division by zero", tool.start_ns + 250_000_000
    picture = {"type": "image", "image": Image.new("RGB", (3, 3), (0, 128, 0))}
    failed.trajectory.messages[1]["content"] = [picture, {"type": "text", "text": "how many?"}]
    others = step_of(6, 2)
    for _ in range(2):
        sender, said = start()
        write(run, sender, 6, others)
        write(run, sender, 7, [failed])
        assert sender.close(120) == {"weave": 0} and not said
        (run.folder / "traces" / "exports.sqlite").unlink()  # as if the process had died before its note

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


def test_an_outage_is_said_and_a_later_try_completes(
    server: TraceServer, run: ExportRun, start: Any, read: Any, tmp_path: Path
) -> None:
    sender, said = start()
    write(run, sender, 6, step_of(6, 1, samples=1))
    wait_for(sender, lambda: sent(run) == 1, "the first episode")
    port = int(server.url.rpartition(":")[2])
    server.stop()
    write(run, sender, 7, step_of(7, 1, samples=1))
    wait_for(sender, lambda: said, "the outage")
    assert "cannot be reached: Connection refused" in said[0]
    again = TraceServer(tmp_path / "runs", port=port)
    try:
        wait_for(sender, lambda: sent(run) == 2, "the second episode")
        assert sender.close(60) == {"weave": 0} and len(said) == 1
        assert [len(read(again, step)) for step in (6, 7)] == [7, 7]
    finally:
        again.stop()


def test_a_server_that_stands_still_does_not_hold_the_end(server: TraceServer, run: ExportRun, start: Any) -> None:
    sender, said = start()
    write(run, sender, 6, step_of(6, 1, samples=1))
    wait_for(sender, lambda: sent(run) == 1, "the first episode")
    server.process.send_signal(signal.SIGSTOP)  # an answer never comes
    write(run, sender, 7, step_of(7, 1, samples=1))
    time.sleep(0.3)
    pid, begin = sender.pid, time.monotonic()
    assert sender.close(0.5) == {"weave": 1}
    assert time.monotonic() - begin < 20
    assert not Path(f"/proc/{pid}").exists() and "1 episodes were not sent" in said[-1]


def test_the_library_is_not_imported_by_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "local")  # else it is refused
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


def test_a_redirect_of_the_calls_is_not_followed(run: ExportRun, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
    sender, said = start()
    try:
        write(run, sender, 6, step_of(6, 1, samples=1))
        wait_for(sender, lambda: said, "the failure")
    finally:
        server.shutdown()
        server.server_close()
    assert "it redirects to /login" in said[0]
    assert "/login" not in asked
