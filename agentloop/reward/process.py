"""`ProcessReward`: a reward function in processes that are killed when it hangs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from agentloop.runtime.processes import ProcessWorkers
from agentloop.types import Task, Trajectory, without_images


class ProcessReward:
    """A reward that runs in worker processes. Task and trajectory are sent as JSON, without
    images."""

    def __init__(self, pool: ProcessWorkers) -> None:
        self._pool = pool

    async def __call__(self, task: Task, text: str, trajectory: Trajectory) -> Any:
        row = {field.name: getattr(task, field.name) for field in fields(task)}
        row |= {"images": [], "prompt": [without_images(message) for message in task.prompt]}
        return await self._pool({"task": row, "text": text, "trajectory": trajectory.to_json()})

    def close(self) -> None:
        self._pool.close()
