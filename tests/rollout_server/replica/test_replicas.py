"""A server over real replica processes: how it ends, and what it says when one does not start."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from agentloop.config.server import ServerSettings
from agentloop.errors import ConfigError, ServerStartError
from rollout_server.api.asgi import send_json
from rollout_server.api.auth import Gate
from rollout_server.replica.starting.torch import REPLICA_TOKEN
from rollout_server.replica.starting.url import UrlSource
from tests.rollout_server.fakes import INFO
from tests.rollout_server.server import Server, serving
from tests.rollout_server.support import save_model


@pytest.fixture
def long_model(tmp_path: Path) -> Path:
    """Its answers may be so long that they run for seconds."""
    return save_model(tmp_path / "long", "qwen2", seed=0, max_position_embeddings=8192)


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    started: list[Server] = []
    yield started
    for server in started:
        server.end()


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=15)[1]


def replica(server: Server, index: int) -> psutil.Process | None:
    """The process of a replica, if it runs."""
    for child in server.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a process in between, while one is forked
            if f"replica-{index}.settings.json" in " ".join(child.cmdline()):
                return child
    return None


async def ask(http: httpx.AsyncClient, new: int, **more: Any) -> httpx.Response:
    sampling = {"max_new_tokens": new, "ignore_eos": True, "sampling_seed": 1}
    return await http.post("/generate", json={"input_ids": [1, 2, 3], "sampling_params": sampling, **more})


async def running(http: httpx.AsyncClient, tokens: int = 1) -> None:
    """Wait until something is sampled somewhere."""
    while True:
        states = (await http.get("/server_info")).json()["states"]
        if sum(state["sampled_tokens"] for state in states) >= tokens:
            return
        await asyncio.sleep(0.02)


async def test_a_stop_lets_requests_end_and_leaves_nothing(
    long_model: Path, tmp_path: Path, servers: list[Server]
) -> None:
    server = Server(tmp_path, "--model", str(long_model), "--replicas", "2", "--drain", "30")
    servers.append(server)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as http:
        answer = asyncio.create_task(ask(http, 1500))
        await running(http)
        children = server.children()
        assert len(children) == 2
        # A forked process shows the environment of the one that imported torch, before it got its own.
        assert not any(REPLICA_TOKEN in child.environ() for child in children), "each imported torch by itself"
        server.process.terminate()
        assert len((await answer).json()["output_ids"]) == 1500
    await asyncio.to_thread(server.process.wait, 20)
    assert gone(children)


async def test_a_seeded_answer_is_the_same_when_its_replica_is_killed_and_replicas_end_with_a_killed_server(
    long_model: Path, tmp_path: Path, servers: list[Server]
) -> None:
    server = Server(tmp_path, "--model", str(long_model), "--replicas", "2", "--stream-tokens", "16")
    servers.append(server)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as http:
        whole = (await ask(http, 1500)).json()
        answer = asyncio.create_task(ask(http, 1500, rid="again"))
        await running(http, tokens=1600)
        states = (await http.get("/server_info")).json()["states"]
        busy = next(index for index, state in enumerate(states) if state["in_flight"])
        victim = replica(server, busy)
        assert victim is not None
        victim.send_signal(signal.SIGKILL)
        again = (await answer).json()
        assert again["output_ids"] == whole["output_ids"]
        for one, other in zip(
            again["meta_info"]["output_token_logprobs"], whole["meta_info"]["output_token_logprobs"], strict=True
        ):
            assert one[1] == other[1] and abs(one[0] - other[0]) < 1e-4
        metrics = (await http.get("/metrics")).text
        assert "rollout_resent_total 1.0" in metrics

    children = server.children()
    assert children
    server.process.kill()
    assert gone(children)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--replicas", "2", "--engine", "sglang", "--python", "/nowhere/python"], "No such file"),
        (["--replica-url", "http://127.0.0.1:9", "--start-timeout", "1"], "does not answer as a rollout server"),
        (["--replicas", "2", "--device", "cuda:99"], "CUDA"),
    ],
)
async def test_a_replica_that_does_not_start_is_an_error_with_its_reason(
    model_dir: Path, tmp_path: Path, servers: list[Server], options: list[str], says: str
) -> None:
    server = Server(tmp_path, "--model", str(model_dir), *options)
    servers.append(server)
    assert await asyncio.to_thread(server.process.wait, 60) == 1
    assert says in server.log.read_text()


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ([], "does not name a model_path"),
        ({}, "does not name a model_path"),
        ({"model_path": 3}, "does not name a model_path"),
        ({"model_path": "m", "tp_size": "two"}, "tp_size 'two', which is not a positive whole number"),
        ({"model_path": "m", "tp_size": [1]}, "tp_size"),
        ({"model_path": "m", "tp_size": -1}, "tp_size"),
    ],
)
async def test_a_url_that_is_no_rollout_server_is_named(facts: Any, says: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send_json(send, json.dumps(facts).encode())

    async with serving(app) as port:
        source = UrlSource(ServerSettings(model="m"), f"http://127.0.0.1:{port}", INFO)
        with pytest.raises(ServerStartError, match=says) as error:
            await source.start()
    assert str(port) in error.value.message and error.value.hint


async def test_servers_at_urls_get_their_token_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        facts = {"model_path": "m", "engine": "torch", "weight_version": "3"}
        await send_json(send, json.dumps(facts).encode())

    monkeypatch.setenv("THEIRS", "a-secret")
    async with serving(Gate(app, "a-secret", None, frozenset(), "127.0.0.1")) as port:
        settings = ServerSettings(model="m", replica_urls=(f"http://127.0.0.1:{port}",), replica_token_env="THEIRS")
        source = UrlSource(settings, settings.replica_urls[0], INFO, settings.replica_token)
        replica = await source.start()
        assert replica.weight_version == "3"
        await replica.close()

        source = UrlSource(settings, settings.replica_urls[0], INFO, None)
        with pytest.raises(ServerStartError, match="bearer token") as error:
            await source.start()
        assert "--replica-token-env" in (error.value.hint or "")
    monkeypatch.delenv("THEIRS")
    with pytest.raises(ConfigError, match="--replica-token-env THEIRS: that variable is not set"):
        settings.check_tokens()


def test_a_replica_that_is_killed_while_the_server_starts_is_started_again(
    model_dir: Path, tmp_path: Path, servers: list[Server]
) -> None:
    server = Server(tmp_path, "--model", str(model_dir), "--replicas", "2")
    servers.append(server)
    deadline = time.monotonic() + 60
    while (first := replica(server, 1)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.kill()
    info = httpx.get(server.url + "/server_info", trust_env=False).json()
    assert [state["state"] for state in info["states"]] == ["serving", "serving"]
    assert "replica torch-1 is started again" in server.log.read_text()
