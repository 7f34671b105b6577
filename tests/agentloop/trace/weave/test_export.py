"""The exporter against a real trace server; read back by an unmodified weave client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agentloop.config import WeaveConfig
from agentloop.errors import ExportError
from agentloop.trace.exporting import ExportRun, TracedEpisode, episodes_of
from agentloop.trace.weave import WeaveExporter
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
    first = exporter._running()._process
    os.kill(first.pid, signal.SIGKILL)
    first.wait(10)
    exporter.export(episodes)
    second = exporter._running()._process
    assert second.pid != first.pid
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
    assert second.poll() is not None
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
