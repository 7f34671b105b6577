"""The server as a process: how it starts, refuses to start, and ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from agentloop.wire import bind, url_of
from tests import forked
from tests.rollout_server.support import random_ids

EVERYWHERE = "0.0.0.0"  # noqa: S104  # given to be refused


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "rollout_server", *arguments]


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """The exit code of a server that ends by itself, and what it printed."""
    log = folder / "server.log"
    process = forked.start("rollout_server", arguments, log)
    return process.wait(60), log.read_text()


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server process that runs one request at a time."""
    ready = tmp_path_factory.mktemp("server") / "ready.json"
    process = subprocess.Popen(
        command(
            "--model",
            str(model_dir),
            "--ready-file",
            str(ready),
            "--max-running",
            "1",
            "--parent-pid",
            str(os.getpid()),
        )
    )
    wait_for(lambda: ready.exists() or process.poll() is not None)
    data = json.loads(ready.read_text())
    assert data["pid"] == process.pid
    yield data["url"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) in (0, -signal.SIGTERM)


def test_a_started_server_generates(server: str) -> None:
    body = {"input_ids": [9, 10, 11], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    answer = httpx.post(f"{server}/generate", json=body)
    assert len(answer.json()["output_ids"]) == 4


def test_a_client_that_leaves_frees_its_slot(server: str) -> None:
    with httpx.Client(base_url=server) as http:
        http.post("/pause_generation", json={"mode": "retract"})
        body = {"input_ids": random_ids(5, seed=1), "sampling_params": {"max_new_tokens": 500, "ignore_eos": True}}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server}/generate", json=body, timeout=0.2)
        left = time.monotonic()
        wait_for(lambda: http.get("/server_info").json()["states"][0]["aborted"] == 1, seconds=5)
        assert time.monotonic() - left < 1.0
        assert http.get("/server_info").json()["states"][0]["waiting"] == 0
        http.post("/continue_generation", json={})
        assert http.get("/health_generate").status_code == 200


def test_a_taken_port_is_named_with_the_way_out(server: str, model_dir: Path) -> None:
    port = server.rsplit(":", 1)[1]
    result = subprocess.run(command("--model", str(model_dir), "--port", port), capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines() == [
        f"error: port {port} on 127.0.0.1 is taken",
        "  fix: stop the process that uses it, or choose another --port (0: any free one)",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "{empty}"], "has no config.json"),
        (["--model", "{empty}/nowhere"], "does not exist"),
        (["--model", "{model}", "--weights", "{empty}"], "lacks safetensors files"),
    ],
    ids=["no model", "no folder", "no weights"],
)
def test_a_model_that_is_none_is_an_error_without_a_traceback(
    model_dir: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    filled = [a.format(empty=tmp_path, model=model_dir) for a in arguments]
    code, said = run(tmp_path, *filled)
    assert code == 2
    assert says in said
    assert "fix:" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", EVERYWHERE], "no token is set"),
        (["--token-env", "AGENTLOOP_NO_SUCH_VARIABLE"], "not set"),
        (["--max-running", "0"], "--max-running"),
        (["--dtype", "float8"], "--dtype"),
        (["--engine", "steam"], "unknown engine 'steam'"),
    ],
)
def test_wrong_options_are_refused(model_dir: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    code, said = run(tmp_path, "--model", str(model_dir), *arguments)
    assert code == 2
    assert says in said


def test_the_server_dies_with_its_parent(model_dir: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    # A parent between this test and the server, which is killed the hard way.
    start = (
        "import subprocess, sys, os, time\n"
        "subprocess.Popen(sys.argv[1:] + ['--parent-pid', str(os.getpid())])\n"
        "time.sleep(600)\n"
    )
    arguments = command("--model", str(model_dir), "--ready-file", str(ready))
    parent = subprocess.Popen([sys.executable, "-c", start, *arguments])
    wait_for(ready.exists)
    child = json.loads(ready.read_text())["pid"]
    parent.kill()
    parent.wait()
    wait_for(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE, seconds=5)


def test_the_url_is_one_that_this_machine_can_call() -> None:
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert url_of(sock, EVERYWHERE) == url_of(sock, "127.0.0.1") == f"http://127.0.0.1:{port}"
        assert url_of(sock, "::1") == f"http://[::1]:{port}"


def test_requests_of_streaming_clients_that_left_are_over(server: str) -> None:
    with httpx.Client(base_url=server) as http:
        body = {"input_ids": [5, 6], "stream": True, "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
        with contextlib.ExitStack() as clients:
            for _ in range(50):  # one runs, the others wait
                one = clients.enter_context(httpx.Client(base_url=server))
                request = one.build_request("POST", "/generate", json=body)
                host = (request.url.host, request.url.port)
                connection = clients.enter_context(socket.create_connection(host))
                head = f"POST /generate HTTP/1.1\r\nhost: {host[0]}\r\ncontent-length: {len(request.content)}\r\n\r\n"
                connection.sendall(head.encode() + request.content)
            wait_for(lambda: http.get("/v1/loads").json()["loads"][0]["num_total_reqs"] >= 25)

        wait_for(lambda: http.get("/v1/loads").json()["loads"][0]["num_total_reqs"] == 0, seconds=10)
        load = http.get("/v1/loads").json()["loads"][0]
        assert load["num_running_reqs"] == load["num_waiting_reqs"] == 0
        # The engine ends them in a step of its own.
        wait_for(lambda: http.get("/server_info").json()["states"][0]["running"] == 0, seconds=10)


def test_sigterm_during_a_request_leaves_no_traceback(model_dir: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    options = ["--model", str(model_dir), "--ready-file", str(ready), "--drain", "1"]
    process = forked.start("rollout_server", options, tmp_path / "server.log")
    wait_for(lambda: ready.exists() or process.poll() is not None)
    url = httpx.URL(json.loads(ready.read_text())["url"])
    group = {
        "master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2, "group_name": "g",
        "backend": "gloo",
    }  # fmt: skip
    body = json.dumps(group).encode()
    with socket.create_connection((url.host, url.port)) as connection:
        head = f"POST /init_weights_update_group HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.replace("host: a", f"host: {url.host}").encode() + body)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        answer = connection.makefile("rb").read()
    process.wait(30)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert "Traceback" not in (tmp_path / "server.log").read_text()
