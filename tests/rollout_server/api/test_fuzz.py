"""Nothing that a client sends ends the server, or is answered with a 5xx."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from agentloop.client.connections import ConnectionPool
from tests.rollout_server.server import Server
from tests.rollout_server.support import VOCAB

BODIES = 10_000
AT_ONCE = 32
LIMITS = {"connect": 60.0, "read": 60.0}
MEETS_OTHERS = "/init_weights_update_group"
"""Asked rightly it waits for other machines: it is fuzzed with wrong requests only."""


@pytest.fixture(scope="module")
def server(model_dir: Path, other_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server process over a real engine; it has to be alive at the end."""
    server = Server(tmp_path_factory.mktemp("server"), "--model", str(model_dir), "--weights-root", str(other_weights))
    try:
        yield server.url
        good = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
        answer = httpx.post(server.url + "/generate", json=good, trust_env=False)
        assert answer.status_code == 200 and len(answer.json()["output_ids"]) == 4
        assert server.process.poll() is None
        server.stop()
    finally:
        server.end()


def templates(weights: Path) -> list[tuple[str, dict[str, Any]]]:
    """A right request for each path."""
    return [
        ("/generate", {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 3, "temperature": 1.0}}),
        (
            "/generate",
            {
                "input_ids": [5] * 20, "rid": "a", "return_logprob": False, "stream": True, "session_id": "s",
                "sampling_params": {
                    "max_new_tokens": 5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "stop_token_ids": [4, 5],
                    "logit_bias": {"3": 1.5}, "frequency_penalty": 0.5, "presence_penalty": -0.5,
                    "repetition_penalty": 1.2, "min_new_tokens": 2, "sampling_seed": 7, "ignore_eos": True,
                    "stream_interval": 2,
                },
            },
        ),
        ("/generate", {"input_ids": [1], "sampling_params": {}, "image_data": ["aGk="], "n": 1, "text": None}),
        (
            "/generate",
            {
                "input_ids": [[1, 2], [3]], "rid": ["a", "b"], "return_logprob": [True, False], "image_data": None,
                "sampling_params": [{"max_new_tokens": 2, "n": 2}, {"max_new_tokens": 0, "n": 2, "sampling_seed": 3}],
            },
        ),
        ("/update_weight_version", {"new_version": "2", "abort_all_requests": False}),
        ("/begin_weight_update", {"selector": "all"}),
        ("/abort_request", {"rid": "a", "abort_all": False, "session_id": "s"}),
        ("/pause_generation", {"mode": "in_place"}),
        ("/continue_generation", {}),
        ("/flush_cache", {}),
        ("/update_weights_from_disk", {"model_path": str(weights), "weight_version": "1", "flush_cache": True}),
        ("/update_weights_from_tensor", {"shm_path": str(weights / "none"), "weight_version": "1"}),
        (
            "/update_weights_from_distributed",
            {"names": ["a"], "dtypes": ["float32"], "shapes": [[2]], "weight_version": "2", "group_name": "g"},
        ),
        ("/destroy_weights_update_group", {"group_name": "g"}),
        ("/release_memory_occupation", {"tags": ["weights"]}),
        ("/resume_memory_occupation", {"tags": None}),
    ]  # fmt: skip


ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**30, -(2**70), 0.5, -0.0, 1e308, 1e-320, "", "x", "\0",
    "\ud800", "é" * 50, "../../etc", "/", "a" * 5000, [], [[]], [None], {}, {"a": 1}, [1] * 600, list(range(VOCAB)),
    [VOCAB], [-1], "NaN", "Infinity", {"3": None}, {"": 1}, ["aGk=", 3],
]  # fmt: skip


def mutate(value: Any, rnd: random.Random) -> Any:
    """The same JSON with one or a few odd places."""
    if isinstance(value, dict) and value and rnd.random() < 0.85:
        changed = dict(value)
        name = rnd.choice(list(changed))
        how = rnd.random()
        if how < 0.15:
            del changed[name]
        elif how < 0.3:
            changed[rnd.choice(["", "x", name + "s", name.upper(), "__proto__", "text", "lora_path"])] = rnd.choice(ODD)
        else:
            changed[name] = mutate(changed[name], rnd)
        return changed
    if isinstance(value, list) and value and rnd.random() < 0.5:
        changed_list = list(value)
        changed_list[rnd.randrange(len(changed_list))] = rnd.choice(ODD)
        return changed_list
    return rnd.choice(ODD)


def body_of(request: dict[str, Any], rnd: random.Random) -> bytes:
    for _ in range(rnd.randint(1, 3)):
        request = mutate(request, rnd)
    data = json.dumps(request).encode("utf-8", errors="surrogatepass")
    if rnd.random() < 0.25:
        place = rnd.randrange(len(data) + 1)
        junk = bytes(rnd.randrange(256) for _ in range(rnd.randint(1, 4)))
        data = (
            data[:place]
            + rnd.choice([b"", junk, b"[" * 500, b"1e999", b"NaN", b'"'])
            + data[place + rnd.randint(0, 9) :]
        )
    return data


async def test_ten_thousand_fuzzed_bodies(server: str, other_weights: Path) -> None:
    rnd = random.Random(11)
    requests = templates(other_weights)
    work = [(path, body_of(body, rnd)) for path, body in (rnd.choice(requests) for _ in range(BODIES))]
    statuses: dict[int, int] = {}
    pool = ConnectionPool(AT_ONCE + 1)
    async with httpx.AsyncClient(transport=pool, base_url=server, timeout=60) as http:

        async def ask() -> None:
            while work:
                path, body = work.pop()
                # The transport alone: a client's own cost would be most of the test's.
                request = httpx.Request(
                    "POST", server + path, content=body, headers={"X-Session-Id": "s"}, extensions={"timeout": LIMITS}
                )
                answer = await pool.handle_async_request(request)
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                assert answer.status_code < 500, (path, body[:500], answer.text)
                if answer.status_code >= 400:
                    assert answer.json()["error"]["message"], (path, body[:500], answer.text)

        async def keep_going() -> None:
            while work:
                await http.post("/continue_generation", json={})
                await asyncio.sleep(0.02)

        await asyncio.gather(keep_going(), *(ask() for _ in range(AT_ONCE)))
        await http.post("/continue_generation", json={})
    assert statuses[200] > BODIES // 50 and statuses[400] > BODIES // 2, statuses


async def test_what_is_no_http(server: str) -> None:
    rnd = random.Random(5)
    url = httpx.URL(server)
    for start in (
        b"",
        b"GET",
        b"POST /generate HTTP/1.1\r\n",
        b"POST /generate HTTP/1.1\r\ncontent-length: 9\r\n\r\n{",
    ):
        for _ in range(25):
            with socket.create_connection((url.host, url.port or 80), timeout=5) as connection:
                connection.sendall(start + bytes(rnd.randrange(256) for _ in range(rnd.randint(0, 200))))
    async with httpx.AsyncClient(base_url=server, trust_env=False) as http:
        assert (await http.get("/health")).status_code == 200


@pytest.mark.filterwarnings("ignore")
def test_requests_made_from_the_schema(server: str) -> None:
    schema = schemathesis.openapi.from_url(server + "/openapi.json")
    session = requests.Session()  # without one, each call makes its own, and a connection
    session.trust_env = False
    tried = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        modes = [GenerationMode.NEGATIVE] if operation.path == MEETS_OTHERS else list(GenerationMode)
        for mode in modes:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
            def ask(case: Any) -> None:
                nonlocal tried
                tried += 1
                answer = case.call(session=session, timeout=30)
                assert answer.status_code < 500, (case.path, case.body, answer.text)

            try:
                ask()
            except Unsatisfiable:
                assert mode is GenerationMode.NEGATIVE  # without parameters nothing is wrong
            httpx.post(server + "/continue_generation", json={}, trust_env=False)
    assert tried > 300
