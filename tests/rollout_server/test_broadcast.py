"""Weights by broadcast from a trainer in another process, with another torch if the environment names one."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file

from agentloop.config.server import ServerSettings
from rollout_server.api.app import build_app
from rollout_server.engines.torch_engine.engine import TorchEngine
from rollout_server.replica.local import LocalReplica
from rollout_server.router.router import Router
from tests.rollout_server.broadcaster import layout
from tests.rollout_server.support import TOLERANCE
from tests.rollout_server.test_transports import PROMPT, checksum_of, error_of

REPO = Path(__file__).parents[2]
TRAINER_PYTHON = os.environ.get("AGENTLOOP_TEST_TRAINER_PYTHON", sys.executable)
"""Interpreter with another torch than the engine's, numpy, safetensors and xxhash."""


class Trainer:
    """`broadcaster.py`, started."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.port = 0

    @classmethod
    async def start(cls, world_size: int, name: str = "weight_update_group") -> Trainer:
        process = await asyncio.create_subprocess_exec(
            TRAINER_PYTHON, str(Path(__file__).with_name("broadcaster.py")), str(world_size), name,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(REPO)},
        )  # fmt: skip
        trainer = cls(process)
        trainer.port = json.loads(await trainer.line())["port"]
        return trainer

    def request(self, world_size: int, **changes: Any) -> dict[str, Any]:
        request = {"master_address": "127.0.0.1", "master_port": self.port, "rank_offset": 1, "backend": "gloo"}
        return {**request, "world_size": world_size, **changes}

    def send(self, file: Path, bucket_bytes: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{file} {bucket_bytes}\n".encode())

    async def line(self) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            return (await self._process.stdout.readline()).decode().strip()

    async def end(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


def described(file: Path) -> dict[str, Any]:
    names, tensors = layout(str(file))
    return {
        "names": names,
        "dtypes": [str(tensors[n].dtype).removeprefix("torch.") for n in names],
        "shapes": [list(tensors[n].shape) for n in names],
    }


@pytest.fixture
async def http(engine_factory: Callable[..., TorchEngine], tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    router = Router([LocalReplica(engine_factory())])
    app = build_app(router, settings=ServerSettings(model="", weights_roots=(tmp_path,)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", timeout=60) as client:
        yield client


@pytest.fixture
async def trainer() -> AsyncIterator[Trainer]:
    started = await Trainer.start(2)
    yield started
    await started.end()


async def generate(http: httpx.AsyncClient) -> dict[str, Any]:
    sampling = {"max_new_tokens": 8, "ignore_eos": True}
    return dict((await http.post("/generate", json={"input_ids": PROMPT, "sampling_params": sampling})).json())


async def test_broadcast_weights_are_served(
    http: httpx.AsyncClient, trainer: Trainer, model_dir: Path, other_weights: Path
) -> None:
    models = {"0": model_dir, "1": other_weights, "2": model_dir, "3": other_weights}
    assert (await http.post("/init_weights_update_group", json=trainer.request(2))).status_code == 200
    assert await trainer.line() == "joined"
    for version, bucket_bytes in ((1, 0), (2, 4000), (3, 10**9)):
        file = models[str(version)] / "model.safetensors"
        request = {"weight_version": str(version), **described(file)}
        if bucket_bytes:
            request |= {"load_format": "flattened_bucket", "bucket_bytes": bucket_bytes}
        call = asyncio.create_task(http.post("/update_weights_from_distributed", json=request))
        await asyncio.sleep(0.05)
        before = await generate(http)  # nothing has arrived yet: the old version serves
        assert before["meta_info"]["weight_version"] == str(version - 1) and not call.done()
        trainer.send(file, bucket_bytes)
        assert await trainer.line() == "sent"
        answer = (await call).json()
        assert (answer["weight_version"], answer["checksum"]) == (str(version), checksum_of(load_file(file)))
        assert error_of(await generate(http), models) < TOLERANCE
    assert (await http.post("/destroy_weights_update_group", json={})).status_code == 200


async def test_a_layout_that_is_not_the_models_is_refused_before_anything_is_received(
    http: httpx.AsyncClient, trainer: Trainer, model_dir: Path
) -> None:
    await http.post("/init_weights_update_group", json=trainer.request(2))
    request = {"weight_version": "1", **described(model_dir / "model.safetensors")}
    request["shapes"][2] = [3]
    answer = await http.post("/update_weights_from_distributed", json=request)
    assert answer.status_code == 400 and "has shape [3]" in answer.json()["error"]["message"]


async def test_a_trainer_that_dies_leaves_the_old_version_serving(
    http: httpx.AsyncClient, trainer: Trainer, model_dir: Path
) -> None:
    await http.post("/init_weights_update_group", json=trainer.request(2))
    request = {"weight_version": "1", **described(model_dir / "model.safetensors")}
    call = asyncio.create_task(http.post("/update_weights_from_distributed", json=request))
    await asyncio.sleep(0.1)
    await trainer.end()
    answer = await call
    assert answer.status_code == 400 and "the broadcast failed" in answer.json()["error"]["message"]
    assert error_of(await generate(http), {"0": model_dir}) < TOLERANCE
    # The group cannot be used any more, and the server reports that.
    again = await http.post("/update_weights_from_distributed", json=request)
    assert (again.status_code, again.json()["error"]["field"]) == (409, "group_name")


async def test_a_cpu_engine_joins_no_nccl_group(http: httpx.AsyncClient, trainer: Trainer) -> None:
    answer = await http.post("/init_weights_update_group", json=trainer.request(2, backend="nccl"))
    assert answer.status_code == 400 and "gloo" in answer.json()["error"]["message"]
