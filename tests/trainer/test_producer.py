"""Admission: the staleness bound holds whatever the timing, and groups come in order."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from agentloop.config import RolloutConfig, SamplingConfig
from agentloop.types import Task, Trajectory
from trainer.producer import Producer

TASKS = [Task(task_id=str(i), agent_name="a", prompt=[]) for i in range(5)]
ROWS = [i % 5 for i in range(1000)]


class SlowRunner:
    """Each episode takes a random time; it notes the version that was served when it began."""

    def __init__(self) -> None:
        self.version = 0
        self.began: dict[str, int] = {}
        self.at_once = 0
        self.most_at_once = 0
        self.closed = 0
        self.rng = random.Random(0)

    async def run(
        self, task: Task, *, group_id: str, sample_index: int, sampling: SamplingConfig, seed: int | None
    ) -> list[Trajectory]:
        self.began.setdefault(group_id, self.version)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.rng.random() * 0.003)
        finally:
            self.at_once -= 1
            self.closed += 1
        return [
            Trajectory([1, 2], [0, 1], [None, -1.0], [None, self.version], 1, task_id=task.task_id, group_id=group_id)
        ]


def make(runner: SlowRunner, **changes: Any) -> Producer:
    config = RolloutConfig(**{"group_size": 2, "batch_size": 3, "max_concurrent": 4, **changes})
    return Producer(runner, TASKS, ROWS, config, seed=0, total_steps=6)


@pytest.mark.parametrize("staleness", [0, 1, 3])
async def test_no_group_starts_more_versions_behind_than_allowed(staleness: int) -> None:
    runner = SlowRunner()
    producer = make(runner, max_staleness=staleness)
    producer.admit(0)
    for step in range(6):
        for group in range(step * 3, step * 3 + 3):
            await producer.take(group)
            assert step - runner.began[f"g{group}"] <= staleness
        await asyncio.sleep(0.002)  # the trainer is slow too
        runner.version += 1
        producer.admit(runner.version)
    assert len(runner.began) == 18
    if staleness:
        assert any(index // 3 > version for index, version in ((int(g[1:]), v) for g, v in runner.began.items()))


async def test_at_most_max_concurrent_episodes_run() -> None:
    runner = SlowRunner()
    producer = make(runner, max_staleness=5)
    producer.admit(0)
    for group in range(18):
        await producer.take(group)
    assert runner.most_at_once == 4


async def test_a_group_holds_the_row_that_its_index_names() -> None:
    producer = make(SlowRunner())
    producer.admit(0)
    groups = [await producer.take(index) for index in (2, 0, 1)]
    assert [group.task.task_id for group in groups] == ["2", "0", "1"]
    assert all(len(group.trajectories) == 2 for group in groups)


async def test_close_ends_running_episodes() -> None:
    runner = SlowRunner()
    producer = make(runner)
    producer.admit(0)
    await asyncio.sleep(0)
    await producer.close()
    assert runner.at_once == 0
