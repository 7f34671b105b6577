"""The publishers against a real SGLang. Its interpreter is named by the variable AGENTLOOP_SGLANG_PYTHON."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.publishing.test_publish import Started, facts, mismatch, publisher_of, step
from trainer.publishing.server_link import ServerLink
from trainer.workers.group import WorkerGroup

PYTHON = os.environ.get("AGENTLOOP_SGLANG_PYTHON")

pytestmark = [pytest.mark.sglang, pytest.mark.skipif(not PYTHON, reason="AGENTLOOP_SGLANG_PYTHON names no interpreter")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def server(tiny_model: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    options = ["--engine", "sglang", "--python", str(PYTHON), "--replicas", "1"]
    started = Started(tiny_model, root, tmp_path_factory.mktemp("sglang"), *options)
    yield started
    started.stop()


@pytest.fixture
async def workers(tiny_model: Path, trainer_config: Any, tmp_path: Path) -> AsyncIterator[WorkerGroup]:
    group = await WorkerGroup.start(
        model_path=str(tiny_model), config=trainer_config, dtype="float32", total_steps=10, seed=0, log_dir=tmp_path
    )
    yield group
    await group.close()


@pytest.mark.parametrize("transport", ["disk", "shm", "distributed"])
async def test_sglang_serves_what_the_trainer_published(
    transport: str, server: Started, workers: WorkerGroup, root: Path
) -> None:
    link = ServerLink(server.url, running="retract", token=None, timeout_s=120)
    publisher = publisher_of(transport, workers, link, root, {})
    first = int((await facts(server))["weight_version"]) + 1
    checksums = set()
    for version in range(first, first + 3):
        await step(workers, seed=version)
        await publisher.publish(version)
        assert await mismatch(server, workers, version) < 1e-3
        checksums.add((await facts(server))["checksum"])
    assert len(checksums) == 3 and all(checksum.startswith("sglang:") for checksum in checksums)
    await publisher.close()
    await link.close()
