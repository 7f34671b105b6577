"""Spans in MLflow and Phoenix, real servers of environments of their own, killed in the middle of a run.

python -m venv MLFLOW && MLFLOW/bin/pip install mlflow          # 3.17
python -m venv PHOENIX && PHOENIX/bin/pip install arize-phoenix  # 20.26
AGENTLOOP_MLFLOW=MLFLOW AGENTLOOP_PHOENIX=PHOENIX pytest -s tests/e2e/test_span_receivers.py
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

MLFLOW_QUERY = """
import json, sys, warnings
warnings.simplefilter("ignore")
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
def search(text):
    return mlflow.search_traces(locations=["0"], filter_string=text, return_type="list", max_results=1000)
everything = search("span.attributes.experiment_name LIKE '%demo%'")
group = search(f"span.attributes.group_id LIKE '{sys.argv[2]}'")
print(json.dumps({
    "all": [[trace.info.trace_id.removeprefix("tr-"), len(trace.data.spans)] for trace in everything],
    "group": sorted(trace.info.trace_id.removeprefix("tr-") for trace in group),
    "types": sorted({str(span.span_type) for trace in everything for span in trace.data.spans}),
    "text": str(group[0].info.request_preview) + str(group[0].info.response_preview),
}))
"""

PHOENIX_QUERY = """
import json, sys
from phoenix.client import Client
from phoenix.client.types.spans import SpanQuery
client = Client(base_url=sys.argv[1])
def spans(where):
    found = client.spans.get_spans_dataframe(query=SpanQuery().where(where), project_identifier="demo", limit=10_000)
    return found
everything = spans("attributes['experiment_name'] == 'demo'")
group = spans(f"attributes['group_id'] == '{sys.argv[2]}'")
print(json.dumps({
    "all": [[trace, len(part)] for trace, part in everything.groupby("context.trace_id")],
    "group": sorted(set(group["context.trace_id"])),
    "types": sorted(set(everything["span_kind"])),
    "text": str(group.to_dict()),
}))
"""


class Server:
    """A receiver that can be killed and started again on its port with its data."""

    def __init__(self, command: list[str], port: int, environment: dict[str, str], log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._command, self._environment, self._log = command, environment, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            environment = {**os.environ, **self._environment}
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if httpx.get(self.url, trust_env=False, timeout=5).status_code < 500:
                    return
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            time.sleep(0.5)
        raise AssertionError(f"{self._command[0]} does not answer:\n{self._log.read_text()[-3000:]}")

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None


def environment_of(variable: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"set {variable} to an environment with the receiver")
    return Path(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    started: list[Server] = []
    yield started
    for server in started:
        server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlflow", "phoenix"])
def test_a_killed_receiver_has_every_episode_once_after_a_push(
    name: str, background: Callable[..., Any], agentloop: Any, servers: list[Server], tmp_path: Path
) -> None:
    home, port = environment_of(f"AGENTLOOP_{name.upper()}"), free_port()
    headers: list[str] = []
    if name == "mlflow":
        command = [str(home / "bin" / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
        environment, query = {"OMP_NUM_THREADS": "1"}, MLFLOW_QUERY
        headers = ["trace.otlp.headers.x-mlflow-experiment-id=0"]
    else:
        command = [str(home / "bin" / "phoenix"), "serve"]
        environment = {
            "PHOENIX_PORT": str(port), "PHOENIX_GRPC_PORT": str(free_port()), "PHOENIX_HOST": "127.0.0.1",
            "PHOENIX_WORKING_DIR": str(tmp_path / "phoenix"), "PHOENIX_TELEMETRY_ENABLED": "false",
        }  # fmt: skip
        query = PHOENIX_QUERY
    server = Server(command, port, environment, tmp_path / f"{name}.log")
    servers.append(server)
    server.start()

    run = background("run.name=demo", "run.steps=12", f"trace.otlp.endpoint={server.url}", *headers)
    run.dir = run.dir.with_name("demo")
    run.wait_for_steps(2)
    time.sleep(3)  # Phoenix confirms spans a moment before it stores them
    server.kill()
    _, out = run.finish()
    assert "cannot be reached" in out and "agentloop trace push --to otlp" in out, out
    server.start()
    options = {"OTEL_EXPORTER_OTLP_HEADERS": "x-mlflow-experiment-id=0"}
    pushed = agentloop("trace", "push", "--to", "otlp", str(run.dir), env=options)
    assert pushed.code == 0, pushed.err

    from agentloop.trace.store import TraceStore

    store = TraceStore(run.dir)
    main = [
        record
        for split in ("train", "eval")
        for step in store.steps(split)
        for record in store.records(step, split)
        if record.is_main
    ]
    group = main[-1].trajectory.group_id if name == "phoenix" else "%" + main[0].trajectory.group_id + "%"
    asked = [str(home / "bin" / "python"), "-c", query, server.url, group]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=600)
    assert answer.returncode == 0, answer.stderr[-3000:]
    found = json.loads(answer.stdout.splitlines()[-1])
    expected = {record.trajectory.trace_id: len(record.trajectory.spans) for record in main}
    assert Counter(trace for trace, _ in found["all"]) == Counter(expected.keys())
    assert dict(found["all"]) == expected
    assert found["group"] and set(found["group"]) <= set(expected)
    assert "TOOL" in found["types"] and "AGENT" in found["types"]
    print(f"\n{name}: {pushed.out.strip()}; {len(expected)} traces, {sum(expected.values())} spans there")
