"""Load a reward function, `score(task, text, trajectory)`.

It returns a number, or a dict with `score` and named parts."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from agentloop.config import RewardConfig
from agentloop.registry import REWARDS, load_reference
from agentloop.reward.checks import check_reward, mentions
from agentloop.reward.process import ProcessReward
from agentloop.runtime.isolation import isolate
from agentloop.runtime.processes import ProcessWorkers
from agentloop.runtime.threads import ThreadWorkers
from agentloop.types import Task, Trajectory

RewardFunction = Callable[[Task, str, Trajectory], Awaitable[Any]]
"""(task, text of the last assistant turn, trajectory) -> score."""


def load_reward(config: RewardConfig | None) -> RewardFunction | None:
    """Load the recipe's `reward`: `path.py:function`, or a name registered in `agentloop.rewards`.

    Raises:
        ConfigError: the file or the function does not exist, or it does not take task, text and
            trajectory.
        RegistryError: no such name is registered.
    """
    if config is None:
        return None

    reference = config.function
    function = load_reference(reference, Path(), REWARDS, key="reward", modules=False)
    check_reward(function, reference)
    if not inspect.isroutine(function) and inspect.iscoroutinefunction(function.__call__):
        function = function.__call__  # an object with an async method is awaited too

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


def reads_ground_truth(config: RewardConfig | None) -> bool:
    """Whether the code of a reward function reads `task.ground_truth`."""
    return _mentions(config, "ground_truth")


def reads_step_rewards(config: RewardConfig | None) -> bool:
    """Whether the code of a reward function reads `trajectory.step_rewards`."""
    return _mentions(config, "step_rewards")


def _mentions(config: RewardConfig | None, name: str) -> bool:
    if config is None:
        return False
    return mentions(load_reference(config.function, Path(), REWARDS, key="reward", modules=False), name)


def close_reward(reward: RewardFunction | None) -> None:
    """End the threads or processes of a reward, if it has any."""
    if isinstance(reward, ProcessReward | ThreadWorkers):
        reward.close()
