"""The metrics of a step's episodes, and the causes of failed ones."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from agentloop.types import EpisodeStatus, Trajectory
from trainer.rollouts.producer import Group


def episode_metrics(groups: Sequence[Group], version: int) -> dict[str, Any]:
    """Return the metrics of a step's episodes.

    Args:
        version: the policy version that the step trains; staleness is counted from it.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    episodes = [episode for group in groups for episode in group.episodes if episode]
    last = [episode[-1] for episode in episodes]
    rewards = [t.reward for t in last if t.status is EpisodeStatus.OK and t.reward is not None]
    sampled = sum(t.sampled_tokens for t in trajectories)
    lengths = [t.response_length for t in trajectories]
    oldest = [v for t in trajectories if t.status is EpisodeStatus.OK and (v := t.min_version) is not None]

    def per_episode(key: str) -> float:
        return _mean(sum(t.metrics.get(key, 0.0) for t in episode) for episode in episodes)

    metrics: dict[str, Any] = {
        "reward/mean": statistics.fmean(rewards) if rewards else None,
        "reward/std": statistics.pstdev(rewards) if rewards else None,
        "episode/count": len(last),
        "episode/turns_mean": _mean(sum(len(t.turns) for t in episode) for episode in episodes),
        "episode/user_turns_mean": per_episode("user_turns"),
        "episode/tool_calls_mean": per_episode("tool_calls"),
        "episode/tool_errors_mean": per_episode("tool_errors"),
        "episode/malformed_calls_mean": per_episode("malformed_calls"),
        "episode/response_tokens_mean": _mean(lengths),
        "episode/response_tokens_max": max(lengths, default=0),
        "episode/forks": len(trajectories) - len(last),
        "episode/failed": sum(t.status is EpisodeStatus.FAILED for t in last),
        "episode/rejected": sum(t.status is EpisodeStatus.REJECTED for t in last),
        "rollout/tokens": sampled,
        "staleness/max": max((version - v for v in oldest), default=0),
    }

    for reason, count in sorted(Counter(t.stop_reason.value for t in last).items()):
        metrics[f"stop/{reason}"] = count
    for rule, count in sorted(Counter(t.broken_rule for t in last if t.broken_rule is not None).items()):
        metrics[f"rejected/{rule}"] = count
    return metrics


def failure_causes(trajectories: Iterable[Trajectory], limit: int = 3) -> list[str]:
    """Return the first distinct reasons why episodes failed or were rejected, at most `limit`."""
    causes: list[str] = []
    for trajectory in trajectories:
        if trajectory.status is not EpisodeStatus.OK:
            cause = f"{trajectory.status.value} (row {trajectory.task_id}): {trajectory.error or 'no reason recorded'}"
            if trajectory.error not in [c.split(": ", 1)[1] for c in causes]:
                causes.append(cause)
        if len(causes) == limit:
            break
    return causes


def _mean(values: Iterable[float]) -> float:
    collected = list(values)
    return statistics.fmean(collected) if collected else 0.0
