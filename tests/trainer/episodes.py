"""A short trajectory and a group of episodes, as the rollouts hand them to the trainer."""

from __future__ import annotations

from agentloop.types import EpisodeStatus, StopReason, Task, Trajectory, Turn
from trainer.rollouts.producer import Group

TASK = Task("0", "a", [])


def trajectory(reward: float | None, status: EpisodeStatus = EpisodeStatus.OK, version: int = 2) -> Trajectory:
    """Two turns of one token each, sampled from `version`."""
    return Trajectory(
        token_ids=[1, 2, 3, 4, 5],
        loss_mask=[0, 0, 1, 0, 1],
        logprobs=[None, None, -0.5, None, -0.25],
        versions=[None, None, version, None, version],
        prompt_length=2,
        turns=[Turn(2, 3, "", StopReason.STOP), Turn(4, 5, "", StopReason.STOP)],
        reward=reward,
        status=status,
        error=None if status is EpisodeStatus.OK else f"{status.value} on purpose",
        metrics={"tool_calls": 1.0},
        task_id="7",
    )


def group(*episodes: list[Trajectory]) -> Group:
    return Group(3, TASK, list(episodes))
