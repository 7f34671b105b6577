"""Rewards: a function `score(task, text, trajectory)` gives a number, or a dict with `score` and named parts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from agentloop.config import RewardConfig
from agentloop.errors import ConfigError
from agentloop.registry import REWARDS, load_reference
from agentloop.runtime.isolation import isolate
from agentloop.runtime.processes import ProcessWorkers
from agentloop.runtime.threads import ThreadWorkers
from agentloop.types import Task, Trajectory

RewardFunction = Callable[[Task, str, Trajectory], Awaitable[Any]]
"""(task, text of the last assistant turn, trajectory) -> score."""


def load_reward(config: RewardConfig | None) -> RewardFunction | None:
    """The reward that `reward` names: `path.py:function`, or a name registered in `agentloop.rewards`.

    Raises:
        ConfigError: the file or function is not there.
        RegistryError: no such name is registered.
    """
    if config is None:
        return None
    reference = config.function
    function = load_reference(reference, Path(), REWARDS, key="reward", modules=False)
    if not callable(function):
        raise ConfigError(f"reward: {reference} is no function", "name a function score(task, text, trajectory)")

    def process(workers: int) -> RewardFunction:
        pool = ProcessWorkers(
            reference,
            Path(),
            REWARDS,
            form="reward",
            workers=workers,
            memory_mb=config.memory_mb,
            name="the reward",
        )
        return ProcessReward(pool)

    return isolate(function, config.run_in, workers=config.workers, name="the reward", process=process)


class ProcessReward:
    """A reward that runs in processes: task and trajectory cross as JSON, without images."""

    def __init__(self, pool: ProcessWorkers) -> None:
        self._pool = pool

    async def __call__(self, task: Task, text: str, trajectory: Trajectory) -> Any:
        row = {field.name: getattr(task, field.name) for field in fields(task)} | {"images": []}
        return await self._pool({"task": row, "text": text, "trajectory": trajectory.to_json()})

    def close(self) -> None:
        self._pool.close()


def close_reward(reward: RewardFunction | None) -> None:
    """End the threads or processes that a reward runs in."""
    if isinstance(reward, ProcessReward | ThreadWorkers):
        reward.close()
