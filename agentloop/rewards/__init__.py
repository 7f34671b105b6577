"""Rewards: a function `score(task, text, trajectory)` gives a number, or a dict with `score` and named parts."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from agentloop.errors import ConfigError
from agentloop.imports import is_file_reference, load_from_file
from agentloop.registry import REWARDS, load
from agentloop.types import Task, Trajectory

RewardFunction = Callable[[Task, str, Trajectory], Awaitable[Any]]
"""(task, text of the last assistant turn, trajectory) -> score."""


def load_reward(reference: str | None) -> RewardFunction | None:
    """The reward that `reward:` names: `path.py:function`, or a name registered in `agentloop.rewards`.

    A plain function runs in a thread, so that a slow one does not hold up the other episodes.

    Raises:
        ConfigError: the file or function is not there.
        RegistryError: no such name is registered.
    """
    if reference is None:
        return None
    function = load_from_file(reference, "reward") if is_file_reference(reference) else load(REWARDS, reference)
    if not callable(function):
        raise ConfigError(f"reward: {reference} is no function", "name a function score(task, text, trajectory)")
    if inspect.iscoroutinefunction(function):
        return function  # type: ignore[no-any-return]

    async def in_thread(task: Task, text: str, trajectory: Trajectory) -> Any:
        return await asyncio.to_thread(function, task, text, trajectory)

    return in_thread
