"""Ranks that connect to the main process over TCP and meet at a store compute what those of a socket pair do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.numpy import load_file

from agentloop.config import TrainerConfig
from agentloop.launch.base import Launcher
from tests.connecting import connecting
from tests.trainer.conftest import make_samples, start_workers
from trainer.workers.group import WorkerGroup
from trainer.workers.rank import RankDied


async def started(model: Path, folder: Path, launcher: Launcher | None) -> WorkerGroup:
    options: dict[str, Any] = {"model_path": str(model), "dtype": "float32", "total_steps": 10, "seed": 0}
    config = TrainerConfig(ranks=2, tokens_per_micro_batch=128)
    return await start_workers(config=config, log_dir=folder / "logs", launcher=launcher, **options)


async def one_step(workers: WorkerGroup, folder: Path) -> tuple[dict[str, float], dict[str, bytes]]:
    samples = make_samples(groups=3, size=4)
    sums = await workers.accumulate(samples, temperature=1.0)
    sums |= await workers.step(sums["normalizer"])
    await workers.publish(folder / "published")
    weights = load_file(folder / "published" / "model.safetensors")
    del sums["time_s"]
    return sums, {name: tensor.tobytes() for name, tensor in weights.items()}


async def test_they_compute_the_same_to_the_bit(tiny_model: Path, tmp_path: Path) -> None:
    results = []
    async with connecting() as launcher:
        for kind in (launcher, None):
            folder = tmp_path / str(kind is None)
            workers = await started(tiny_model, folder, kind)
            try:
                assert workers.address == ("" if kind is None else "127.0.0.1")
                results.append(await one_step(workers, folder))
                if kind is not None:  # the ranks' store is not in a file, and not on other addresses
                    assert not (folder / "logs" / ".ranks").exists()
                    rank0 = psutil.Process(workers._ranks[0].process.pid)
                    listening = [c for c in rank0.net_connections() if c.status == psutil.CONN_LISTEN]
                    assert listening and {c.laddr.ip for c in listening} == {"127.0.0.1"}
            finally:
                await workers.close()
    assert results[0] == results[1]


async def test_a_killed_rank_is_named_and_the_others_end(tiny_model: Path, tmp_path: Path) -> None:
    async with connecting() as launcher:
        workers = await started(tiny_model, tmp_path, launcher)
        processes = [psutil.Process(rank.process.pid) for rank in workers._ranks]
        processes[1].kill()
        with pytest.raises(RankDied, match="rank 1 died"):
            await workers.accumulate(make_samples(groups=3, size=4), temperature=1.0)
        await workers.close()
        await asyncio.to_thread(psutil.wait_procs, processes, timeout=60)
        assert not any(process.is_running() for process in processes)
