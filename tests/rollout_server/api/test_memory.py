"""Device memory is released while nothing runs, and new requests wait until it is back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from agentloop.config.server import ServerSettings
from agentloop.wire import SamplingParams
from rollout_server.api.app import build_app
from rollout_server.engines.base import Generation
from rollout_server.engines.torch_engine.engine import TorchEngine
from rollout_server.errors import Conflict
from rollout_server.replica.local import LocalReplica
from rollout_server.replica.starting.sglang import sglang_command
from rollout_server.router.fleet import Fleet
from rollout_server.router.router import Router
from tests.rollout_server.fakes import INFO, FakeReplica, FakeSource

ASK = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True}}


def http(engine: TorchEngine) -> httpx.AsyncClient:
    app = build_app(Router([LocalReplica(engine)]), settings=ServerSettings(model="in this process"))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")


async def test_the_cache_is_released_and_requests_wait_until_it_is_back(
    engine_factory: Callable[..., TorchEngine],
) -> None:
    engine = engine_factory(memory_saver=True)
    async with http(engine) as client:
        before = (await client.post("/generate", json=ASK)).json()
        assert engine.stats().kv_tokens > 0

        assert (await client.post("/release_memory_occupation", json={})).status_code == 200
        assert engine.stats().kv_tokens == 0
        waiting = asyncio.create_task(client.post("/generate", json=ASK))
        await client.post("/resume_memory_occupation", json={"tags": ["weights"]})
        await asyncio.sleep(0.1)
        assert not waiting.done()

        await client.post("/resume_memory_occupation", json={"tags": ["kv_cache"]})
        answer = (await waiting).json()
        assert answer["output_ids"] == before["output_ids"]
        assert answer["meta_info"]["cached_tokens"] == 0  # nothing of the cache was kept


async def test_an_engine_without_the_memory_saver_refuses(engine_factory: Callable[..., TorchEngine]) -> None:
    async with http(engine_factory()) as client:
        answer = await client.post("/release_memory_occupation", json={})
    assert answer.status_code == 409 and "--memory-saver" in answer.text


async def test_memory_in_use_is_not_released() -> None:
    replica = FakeReplica()
    replica.go_on.clear()
    router = Router([replica])
    generation = asyncio.create_task(router.generate(_generation()))
    await asyncio.sleep(0)
    with pytest.raises(Conflict, match="1 requests are in flight"):
        await router.memory("release", None)
    replica.go_on.set()
    await generation
    await router.memory("release", None)
    assert replica.calls == ["release ['kv_cache', 'weights']"]


async def test_only_what_changes_is_sent_because_sglang_ends_otherwise() -> None:
    replica = FakeReplica()
    router = Router([replica])
    await router.memory("resume", None)
    await router.memory("release", ["kv_cache"])
    await router.memory("release", None)
    await router.memory("resume", ["weights"])
    await router.memory("resume", None)
    assert [call for call in replica.calls if not call.endswith("[]")] == [
        "release ['kv_cache']", "release ['weights']", "resume ['weights']", "resume ['kv_cache']"
    ]  # fmt: skip
    assert not router.released


async def test_a_replica_that_starts_meanwhile_releases_its_memory_too() -> None:
    router = Router(info=INFO, version="0")
    source = FakeSource()
    fleet = Fleet(router, [source], probe_every_s=0.01)
    await fleet.start()
    try:
        await router.pause("wait")
        await router.memory("release", None)
        source.die()
        await router.members.wait_until(lambda: len(source.replicas) == 2 and router.members[0].serves)
        assert source.replicas[1].calls == ["pause in_place", "release ['kv_cache', 'weights']"]
    finally:
        await fleet.close()


def test_sglang_is_started_so_that_it_can_release_memory_on_the_gpus_after_the_trainers() -> None:
    options: dict[str, Any] = {"model": "m", "engine": "sglang", "replicas": 2, "gpus_per_replica": 2}
    settings = ServerSettings(**options, device="cuda", first_gpu=4, memory_saver=True)
    command = sglang_command(settings, 1, 1)
    assert "--enable-memory-saver" in command and command[command.index("--base-gpu-id") + 1] == "6"
    assert "--enable-memory-saver" not in sglang_command(ServerSettings(**options, memory_saver=True), 0, 1)


def _generation() -> Generation:
    return Generation("r", [1, 2], SamplingParams(max_new_tokens=2))
